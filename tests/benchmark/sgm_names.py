"""Names and shapes of Stability's ``generative-models`` (sgm) checkpoints, written down from its architecture.

Independent of diffusers and of this project: the UNet as numbered input, middle and output blocks, the autoencoder as
``down``, ``mid`` and ``up``.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def unet_shapes(
    channels: int = 320,
    multipliers: tuple[int, ...] = (1, 2, 4),
    depths: tuple[int, ...] = (0, 2, 10),
    context: int = 1664,
    vector: int = 1024,
    blocks: int = 2,
) -> Shapes:
    """sgm's ``UNetModel`` with linear projections and a sequential label embedding, under ``model.diffusion_model.``."""
    shapes: Shapes = {}
    embedding = 4 * channels

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def conv(name: str, inputs: int, outputs: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.in_layers.0", inputs)
        conv(f"{name}.in_layers.2", inputs, outputs, 3)
        linear(f"{name}.emb_layers.1", embedding, outputs)
        norm(f"{name}.out_layers.0", outputs)
        conv(f"{name}.out_layers.3", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.skip_connection", inputs, outputs, 1)

    def transformer(name: str, width: int, depth: int) -> None:
        norm(f"{name}.norm", width)
        linear(f"{name}.proj_in", width, width)
        linear(f"{name}.proj_out", width, width)
        for k in range(depth):
            block = f"{name}.transformer_blocks.{k}"
            for attention, keys in (("attn1", width), ("attn2", context)):
                linear(f"{block}.{attention}.to_q", width, width, bias=False)
                linear(f"{block}.{attention}.to_k", keys, width, bias=False)
                linear(f"{block}.{attention}.to_v", keys, width, bias=False)
                linear(f"{block}.{attention}.to_out.0", width, width)
            linear(f"{block}.ff.net.0.proj", width, 8 * width)
            linear(f"{block}.ff.net.2", 4 * width, width)
            for number in (1, 2, 3):
                norm(f"{block}.norm{number}", width)

    linear("time_embed.0", channels, embedding)
    linear("time_embed.2", embedding, embedding)
    linear("label_emb.0.0", vector, embedding)
    linear("label_emb.0.2", embedding, embedding)
    conv("input_blocks.0.0", 4, channels, 3)
    skips, width, number = [channels], channels, 1
    for level, (multiplier, depth) in enumerate(zip(multipliers, depths, strict=True)):
        for _ in range(blocks):
            residual(f"input_blocks.{number}.0", width, multiplier * channels)
            width = multiplier * channels
            if depth:
                transformer(f"input_blocks.{number}.1", width, depth)
            skips.append(width)
            number += 1
        if level < len(multipliers) - 1:
            conv(f"input_blocks.{number}.0.op", width, width, 3)
            skips.append(width)
            number += 1
    residual("middle_block.0", width, width)
    transformer("middle_block.1", width, depths[-1])
    residual("middle_block.2", width, width)
    number = 0
    for level in reversed(range(len(multipliers))):
        for k in range(blocks + 1):
            residual(f"output_blocks.{number}.0", width + skips.pop(), multipliers[level] * channels)
            width = multipliers[level] * channels
            if depths[level]:
                transformer(f"output_blocks.{number}.1", width, depths[level])
            if level and k == blocks:
                conv(f"output_blocks.{number}.{2 if depths[level] else 1}.conv", width, width, 3)
            number += 1
    norm("out.0", channels)
    conv("out.2", channels, 4, 3)
    return {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}


def vae_shapes(channels: int = 128, multipliers: tuple[int, ...] = (1, 2, 4, 4), latent: int = 4) -> Shapes:
    """sgm's ``AutoencoderKL`` under ``first_stage_model.``, two residual blocks a level."""
    shapes: Shapes = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def middle(name: str, width: int) -> None:
        residual(f"{name}.block_1", width, width)
        norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", width, width, 1)
        residual(f"{name}.block_2", width, width)

    levels = [multiplier * channels for multiplier in multipliers]
    conv("encoder.conv_in", 3, channels, 3)
    width = channels
    for level, out in enumerate(levels):
        for k in range(2):
            residual(f"encoder.down.{level}.block.{k}", width, out)
            width = out
        if level < len(levels) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, 2 * latent, 3)
    conv("quant_conv", 2 * latent, 2 * latent, 1)
    conv("post_quant_conv", latent, latent, 1)
    conv("decoder.conv_in", latent, width, 3)
    middle("decoder.mid", width)
    for level in reversed(range(len(levels))):
        for k in range(3):
            residual(f"decoder.up.{level}.block.{k}", width, levels[level])
            width = levels[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3, 3)
    return {f"first_stage_model.{name}": shape for name, shape in shapes.items()}
