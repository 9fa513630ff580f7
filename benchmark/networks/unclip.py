"""SDXL-unCLIP, the diffusion model that Brain-IT conditions on CLIP tokens, from MindEye2's checkpoint.

The UNet has SDXL's layout with the cross-attention of 256 x 1664 tokens and a vector of 1024 numbers (the codes of size
and crop alone); the autoencoder is SDXL's. Sizes: MindEye2's unclip6.yaml. The checkpoint's names are those of
Stability's ``generative-models`` (sgm); diffusers knows how they map to its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.errors import UserError
from benchmark.networks.files import load_weights
from benchmark.networks.seeded import seeded
from benchmark.weights import DOWNLOADS, weights_file
from methods.brain_it.generate import Generator
from methods.brain_it.unclip import size_vector

IMAGE_SIZE = 256  # Brain-IT works at 256 pixels, MindEye2 at 768 (official code)
SDXL_SCALE = 0.13025
UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."

UNET: Mapping[str, Any] = {
    "sample_size": IMAGE_SIZE // 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    # The vector goes in as it is; sgm's "sequential" label embedding is diffusers' projection of class labels.
    "class_embed_type": "projection",
    "cross_attention_dim": 1664,
    "projection_class_embeddings_input_dim": 1024,
}
VAE: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": SDXL_SCALE,
}


def build_unet(config: Mapping[str, Any] = UNET) -> nn.Module:
    """Return the UNet on the ``meta`` device: 2.50 billion parameters in 1,680 tensors."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: nn.Module = UNet2DConditionModel(**config)
    return unet


def build_vae(config: Mapping[str, Any] = VAE) -> nn.Module:
    """Return the autoencoder on the ``meta`` device: 84 million parameters in 248 tensors."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae: nn.Module = AutoencoderKL(**config)
    return vae


def unet_names(found: dict[str, Tensor], config: Mapping[str, Any] = UNET) -> dict[str, Tensor]:
    """Return an sgm checkpoint's UNet under diffusers' names; tensors that no name of diffusers' is for keep theirs."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return _renamed(found, lambda tensors: convert_ldm_unet_checkpoint(tensors, dict(config)))


def vae_names(found: dict[str, Tensor], config: Mapping[str, Any] = VAE) -> dict[str, Tensor]:
    """Return an sgm checkpoint's autoencoder under diffusers' names; tensors that no name is for keep theirs."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return _renamed(found, lambda tensors: convert_ldm_vae_checkpoint(tensors, dict(config)))


def _renamed(found: dict[str, Tensor], convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
    # diffusers passes over what it does not know, without a word. Numbered stand-ins tell what came through.
    marked = {name: torch.full((1, 1, 1, 1), k, dtype=torch.float64) for k, name in enumerate(found)}
    taken = {int(mark.flatten()[0]) for mark in convert(marked).values()}
    converted = convert(dict(found))
    return {**converted, **{name: tensor for k, (name, tensor) in enumerate(found.items()) if k not in taken}}


def _refusing(
    names: Callable[[dict[str, Tensor], Mapping[str, Any]], dict[str, Tensor]], config: Mapping[str, Any]
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return ``names`` for ``load_weights``: what diffusers looks for in vain becomes a refusal that names it."""

    def convert(found: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            return names(found, config)
        except (LookupError, AttributeError, ValueError) as error:
            missing = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else f"not of its family ({error})"
            raise UserError(missing) from error

    return convert


def read_unet(
    unet: nn.Module,
    path: Path,
    what: str,
    config: Mapping[str, Any] = UNET,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Fill a UNet of :func:`build_unet` from an sgm checkpoint: all of its tensors used, none missing.

    Args:
        unet: on the ``meta`` device.
        path: ``.ckpt`` (a dict with ``state_dict``) or ``.safetensors``.
        what: for messages.
        config: its sizes.
        dtype: in which its weights are kept.

    Raises:
        UserError: the file is missing, damaged or of another network; the message names the first tensor at fault.
    """
    load_weights(unet, path, what, dtype=dtype, only=(UNET_PREFIX,), convert=_refusing(unet_names, config))


def read_vae(vae: nn.Module, path: Path, what: str, config: Mapping[str, Any] = VAE) -> None:
    """Fill an autoencoder of :func:`build_vae` from an sgm checkpoint, in float32: it overflows in half precision.

    Raises:
        UserError: as :func:`read_unet`.
    """
    load_weights(vae, path, what, only=(VAE_PREFIX,), convert=_refusing(vae_names, config))


def sdxl_unclip(
    name: str,
    weights: Path | None = None,
    random_seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    unet: Path | None = None,
) -> Generator:
    """Return SDXL-unCLIP, frozen, for images of 256 pixels: its vector says (256, 256) and crop (0, 0) (Sec. D.3).

    Args:
        name: of :data:`benchmark.weights.DOWNLOADS`.
        weights: folder of the weights files.
        random_seed: draw the weights instead.
        dtype: in which the UNet's weights are kept.
        unet: file of a UNet that was trained further (diffusers' names), read instead of the published one.

    Raises:
        UserError: the file is missing or does not fit.
    """
    vae, _ = sdxl_autoencoder(name, weights, random_seed)
    made = build_unet()
    if unet is not None:
        load_weights(made, unet, f"the trained UNet of {name}", dtype=dtype)
    elif random_seed is not None:
        seeded(made, name, random_seed, dtype)
    else:
        read_unet(made, weights_file(name, weights), DOWNLOADS[name].title, dtype=dtype)
    made.eval().requires_grad_(False)
    return Generator(vae, made, image_size=IMAGE_SIZE, vector=size_vector(IMAGE_SIZE, IMAGE_SIZE))  # type: ignore[arg-type]


def sdxl_autoencoder(name: str, weights: Path | None = None, random_seed: int | None = None) -> tuple[nn.Module, int]:
    """Return the autoencoder of SDXL-unCLIP, frozen, and the side of Brain-IT's images.

    Raises:
        UserError: the file is missing or does not fit.
    """
    vae = build_vae()
    if random_seed is not None:
        seeded(vae, f"{name} vae", random_seed)
    else:
        read_vae(vae, weights_file(name, weights), DOWNLOADS[name].title)
    vae.eval().requires_grad_(False)
    return vae, IMAGE_SIZE
