"""The demo's generator: a tiny unCLIP, its weights, and the script, seed and log that made them.

``vae.safetensors`` is a diffusers ``AutoencoderKL`` (64 x 64 pixels to 4 x 16 x 16 latents), ``unet.safetensors`` a
diffusers ``UNet2DConditionModel`` that takes 16 x 320 semantic tokens by cross-attention. Both were trained by ``python
-m benchmark.demo_generator.train`` on scenes that no simulated subject ever sees (their seed is reserved).
"""
