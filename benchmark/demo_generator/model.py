"""Architecture of the demo's generator, and how its files are read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmark.errors import UserError

FOLDER = Path(__file__).parent
IMAGE_SIZE = 64
TOKEN_SHAPE = (16, 320)  # a 4 x 4 grid of EfficientNet-Lite0 block 6

VAE_CONFIG: Mapping[str, Any] = {
    "block_out_channels": (24, 48, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": IMAGE_SIZE,
}
UNET_CONFIG: Mapping[str, Any] = {
    "sample_size": 16,
    "in_channels": 6,  # 4 latent channels and the two coordinates
    "out_channels": 4,
    "block_out_channels": (64, 96),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "cross_attention_dim": TOKEN_SHAPE[1],
    "attention_head_dim": (2, 3),  # diffusers' name for the number of heads
    "norm_num_groups": 16,
    "use_linear_projection": True,
}


class TokenUNet(nn.Module):
    """A ``UNet2DConditionModel`` that knows where things are.

    CLIP's patch tokens carry their position; a small CNN's do not. So each token gets a learned position vector, and
    the latent its two coordinates as extra channels. Called like the diffusers model.
    """

    coordinates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**UNET_CONFIG)
        self.token_positions = nn.Parameter(torch.randn(TOKEN_SHAPE) * 0.2)
        line = torch.linspace(-1, 1, UNET_CONFIG["sample_size"])
        self.register_buffer(
            "coordinates", torch.stack(torch.meshgrid(line, line, indexing="ij"))[None], persistent=False
        )

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **conditions: Any) -> Any:
        """Predict the noise in ``sample`` (B x 4 x 16 x 16) given tokens (B x 16 x 320); see diffusers for the rest."""
        coordinates = self.coordinates.to(sample.dtype).expand(len(sample), -1, -1, -1)
        tokens = encoder_hidden_states + self.token_positions
        return self.unet(torch.cat([sample, coordinates], dim=1), timestep, tokens, **conditions)


def build_vae() -> AutoencoderKL:
    """Return the demo's autoencoder with fresh weights."""
    return AutoencoderKL(**VAE_CONFIG)


@dataclass(frozen=True)
class DemoGenerator:
    """The trained parts and the constants that belong to them."""

    vae: AutoencoderKL
    unet: TokenUNet
    scaling_factor: float  # latent times this has unit variance
    token_mean: Tensor  # 320: statistics of the raw tokens over the training scenes
    token_std: Tensor  # 320

    def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write weights (float16) and constants to ``folder``; ``record`` says how they were made."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("vae", self.vae), ("unet", self.unet)):
            half = {k: v.detach().to(torch.float16).contiguous() for k, v in part.state_dict().items()}
            save_file(half, folder / f"{name}.safetensors")
        save_file({"mean": self.token_mean.float(), "std": self.token_std.float()}, folder / "tokens.safetensors")
        settings = {"scaling_factor": self.scaling_factor, **record}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")

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
