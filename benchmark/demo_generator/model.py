"""Architecture of the demo's generator, and how its files are read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmark.errors import UserError
from methods.brain_it.unclip import NoiseSchedule

FOLDER = Path(__file__).parent
IMAGE_SIZE = 64
TOKEN_SHAPE = (16, 320)  # a 4 x 4 grid of EfficientNet-Lite0 block 6
LATENT_CHANNELS, LATENT_SIZE = 4, 16

VAE_CONFIG: Mapping[str, Any] = {
    "block_out_channels": (24, 48, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 8,
    "sample_size": IMAGE_SIZE,
}
SKETCH_WIDTH, SKETCH_DEPTH, SKETCH_HEADS, SKETCH_CHANNELS = 192, 4, 4, 16
UNET_CONFIG: Mapping[str, Any] = {
    "sample_size": LATENT_SIZE,
    "in_channels": 2 * LATENT_CHANNELS + SKETCH_CHANNELS + 2,  # noisy latent, sketched latent, map, two coordinates
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (64, 128),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),  # as SDXL: no attention at the largest size
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": SKETCH_WIDTH,
    "attention_head_dim": (2, 4),  # diffusers' name for the number of heads
    "norm_num_groups": 16,
    "use_linear_projection": True,
}


class TokenSketch(nn.Module):
    """Reads a picture's tokens and sketches its latent: what can be said before any noise is looked at.

    CLIP's patch tokens carry their position and have been through a deep transformer; a small CNN's have not. So each
    token gets a learned position vector, a small transformer lets them see each other, and each then paints its own
    part of a map as large as the latent.
    """

    def __init__(self) -> None:
        super().__init__()
        count, width = TOKEN_SHAPE
        self.side = int(count**0.5)  # tokens a row
        self.patch = LATENT_SIZE // self.side  # latent pixels a token paints, along a side
        self.project = nn.Linear(width, SKETCH_WIDTH)
        self.positions = nn.Parameter(torch.randn(count, SKETCH_WIDTH) * 0.2)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                SKETCH_WIDTH, SKETCH_HEADS, 2 * SKETCH_WIDTH, 0.1, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(SKETCH_DEPTH)
        )
        self.norm = nn.LayerNorm(SKETCH_WIDTH)
        self.paint = nn.Linear(SKETCH_WIDTH, SKETCH_CHANNELS * self.patch**2)
        self.latent = nn.Sequential(
            nn.Conv2d(SKETCH_CHANNELS, 48, 3, padding=1), nn.GELU(), nn.Conv2d(48, LATENT_CHANNELS, 3, padding=1)
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return context (B x 16 x 192), map (B x 16 x 16 x 16) and sketched latent (B x 4 x 16 x 16)."""
        x = self.project(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        patches = self.paint(x).view(-1, self.side, self.side, SKETCH_CHANNELS, self.patch, self.patch)
        painted = patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, SKETCH_CHANNELS, LATENT_SIZE, LATENT_SIZE)
        return x, painted, self.latent(painted)


class TokenUNet(nn.Module):
    """A ``UNet2DConditionModel`` under the guidance of a :class:`TokenSketch`; called like the diffusers model.

    The noise levels are Stable Diffusion's. At the highest the latent is all but noise, and predicting that noise means
    copying the input: the little that the tokens add drowns. So the inner network predicts v = sqrt(a) noise -
    sqrt(1 - a) latent (Salimans & Ho 2022), where a is the level's ``alphas_cumprod``; the noise follows from it.
    """

    coordinates: Tensor
    alphas: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.sketch = TokenSketch()
        self.unet = UNet2DConditionModel(**UNET_CONFIG)
        # On a CPU the backward pass of fused attention costs half of a training step; the maps are small.
        self.unet.set_attn_processor(AttnProcessor())
        line = torch.linspace(-1, 1, LATENT_SIZE)
        coordinates = torch.stack(torch.meshgrid(line, line, indexing="ij"))[None]
        self.register_buffer("coordinates", coordinates, persistent=False)
        self.register_buffer("alphas", NoiseSchedule().alphas_cumprod.float(), persistent=False)

    def velocity(self, sample: Tensor, timestep: Tensor, tokens: Tensor, **conditions: Any) -> tuple[Tensor, Tensor]:
        """Return v and the sketched latent, both B x 4 x 16 x 16; arguments as :meth:`forward`."""
        context, painted, sketched = self.sketch(tokens)
        coordinates = self.coordinates.to(sample.dtype).expand(len(sample), -1, -1, -1)
        x = torch.cat([sample, sketched.to(sample.dtype), painted.to(sample.dtype), coordinates], dim=1)
        return self.unet(x, timestep, context, return_dict=False, **conditions)[0], sketched

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        *,
        return_dict: bool = True,
    ) -> Any:
        """Predict the noise in ``sample``.

        Args:
            sample: (B, 4, 16, 16), sqrt(a) latent + sqrt(1 - a) noise.
            timestep: (B,) or (), noise levels 0 to 999.
            encoder_hidden_states: (B, 16, 320) tokens.
            class_labels: handed to the diffusers model.
            return_dict: an ``UNet2DConditionOutput``, or else a tuple of the prediction alone.
        """
        v, _ = self.velocity(sample, timestep, encoder_hidden_states, class_labels=class_labels)
        a = self.alphas[timestep].view(-1, 1, 1, 1).to(sample.dtype)
        noise = a.sqrt() * v.to(sample.dtype) + (1 - a).sqrt() * sample
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)


def build_vae() -> AutoencoderKL:
    """Return the demo's autoencoder with fresh weights."""
    return AutoencoderKL(**VAE_CONFIG)


def _save_half(part: nn.Module, file: Path) -> None:
    save_file({k: v.detach().to(torch.float16).contiguous() for k, v in part.state_dict().items()}, file)


@dataclass(frozen=True)
class DemoGenerator:
    """The trained parts and the constants that belong to them."""

    vae: AutoencoderKL
    unet: TokenUNet
    scaling_factor: float  # latent times this has unit variance
    token_mean: Tensor  # 320: statistics of the raw tokens over the training scenes
    token_std: Tensor  # 320

    def save(self, folder: Path) -> None:
        """Write weights (float16) and constants to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save_vae(self.vae, folder)
        _save_half(self.unet, folder / "unet.safetensors")
        save_file({"mean": self.token_mean.float(), "std": self.token_std.float()}, folder / "tokens.safetensors")
        (folder / "config.json").write_text(json.dumps({"scaling_factor": self.scaling_factor}, indent=2) + "\n")

    @staticmethod
    def save_vae(vae: AutoencoderKL, folder: Path) -> None:
        """Write the autoencoder alone."""
        _save_half(vae, folder / "vae.safetensors")

    @staticmethod
    def load_vae(folder: Path) -> AutoencoderKL:
        """Read the autoencoder alone, in float32 and evaluation mode."""
        vae = build_vae()
        vae.load_state_dict({k: v.float() for k, v in load_file(folder / "vae.safetensors").items()})
        return vae.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path = FOLDER) -> DemoGenerator:
        """Read what :meth:`save` wrote, in float32 and evaluation mode."""
        try:
            scaling = float(json.loads((folder / "config.json").read_text())["scaling_factor"])
            vae, unet = cls.load_vae(folder), TokenUNet()
            unet.load_state_dict({k: v.float() for k, v in load_file(folder / "unet.safetensors").items()})
            tokens = load_file(folder / "tokens.safetensors")
            mean, std = tokens["mean"], tokens["std"]
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            short = str(error).partition("\n")[0]
            raise UserError(
                f"{folder}: the demo generator's files are missing or damaged ({short}); reinstall the project"
            ) from error
        unet.eval().requires_grad_(False)
        vae.register_to_config(scaling_factor=scaling)
        return cls(vae, unet, scaling, mean, std)
