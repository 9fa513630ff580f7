"""SDXL as Brain-IT refines with it: UNet, autoencoder and the two text towers of one single-file checkpoint.

The file has the names of Stability's ``generative-models``. Only two texts are ever encoded, so the towers are read,
used and let go.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.networks.files import load_weights
from benchmark.networks.seeded import seeded
from benchmark.networks.unclip import UNET, build_unet, build_vae, read_unet, read_vae
from benchmark.weights import DOWNLOADS, weights_file
from methods.brain_it.refine import Prompt, Refiner

SDXL_UNET: Mapping[str, Any] = {
    **UNET,
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L: Mapping[str, Any] = {"width": 768, "heads": 12, "layers": 12}
CLIP_BIGG: Mapping[str, Any] = {"width": 1280, "heads": 20, "layers": 32}
_CLIP_L_PREFIX, _BIGG_PREFIX = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."

PROMPT = ""
# What MindEye2 denoises away from (src/enhanced_recon_inference.ipynb, batch_uc), and Brain-IT after it.
NEGATIVE_PROMPT = (
    "painting, extra fingers, mutated hands, poorly drawn hands, poorly drawn face, deformed, ugly, blurry, bad"
    " anatomy, bad proportions, extra limbs, cloned face, skinny, glitchy, double torso, extra arms, extra hands,"
    " mangled fingers, missing lips, ugly face, distorted face, extra legs, anime"
)
_END_OF_TEXT = 49407


def text_tower(sizes: Mapping[str, Any], *, quick: bool, projected: bool) -> nn.Module:
    """Return a CLIP text tower on the ``meta`` device.

    Args:
        sizes: width, heads, layers.
        quick: OpenAI's approximation of GELU, which CLIP ViT-L/14 was trained with.
        projected: with the projection to the space that texts share with images.
    """
    from open_clip.transformer import QuickGELU, TextTransformer

    with torch.device("meta"):
        tower = TextTransformer(
            **sizes,
            output_dim=sizes["width"] if projected else None,
            act_layer=QuickGELU if quick else nn.GELU,
        )
    tower.register_buffer("attn_mask", tower.build_causal_mask(), persistent=False)  # in no file: made here and now
    return tower


def clip_l_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of transformers' ``CLIPTextModel``, prefix taken off, under open_clip's names."""
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    converted, joined = {}, set()
    for full, tensor in found.items():
        name = full.removeprefix(_CLIP_L_PREFIX)
        if name == "embeddings.position_ids":  # 0 .. 76, no weights
            continue
        _, _, rest = name.partition("encoder.layers.")
        number, _, rest = rest.partition(".")
        part, _, kind = rest.rpartition(".")
        if name in names:
            converted[names[name]] = tensor
        elif part in parts:
            converted[f"transformer.resblocks.{number}.{parts[part]}.{kind}"] = tensor
        elif part == "self_attn.q_proj":
            three = [full.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            if all(each in found for each in three):
                converted[f"transformer.resblocks.{number}.attn.in_proj_{kind}"] = torch.cat([found[t] for t in three])
                joined.update(three)
        elif full not in joined and part not in ("self_attn.k_proj", "self_attn.v_proj"):
            converted[full] = tensor  # not known: whoever loads the rest refuses it by name
    return converted


def bigg_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of open_clip's text tower, prefix and what is no part of the tower taken off."""
    own = {name.removeprefix(_BIGG_PREFIX): tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in own.items() if name not in ("logit_scale", "attn_mask")}


@torch.no_grad()
def encode_prompt(clip_l: nn.Module, bigg: nn.Module, text: str) -> Prompt:
    """Return a text as SDXL sees it: both towers' last hidden states but one, and the second's pooled embedding.

    The first tower is fed texts filled up with its end mark, the second with zeros (as their code does).
    """
    import open_clip

    tokens = open_clip.tokenize([text])
    after_end = (tokens == _END_OF_TEXT).cumsum(1) - (tokens == _END_OF_TEXT).long() > 0
    filled = torch.where(after_end, _END_OF_TEXT, tokens)
    first = _hidden(clip_l, filled)["text_intermediates"][0]
    second = _hidden(bigg, tokens)
    return Prompt(torch.cat([first[0], second["text_intermediates"][0][0]], dim=1), second["text_features"][0])


def _hidden(tower: nn.Module, tokens: Tensor) -> dict[str, Any]:
    last_but_one = len(tower.transformer.resblocks) - 2  # type: ignore[arg-type, union-attr]
    found: dict[str, Any] = tower.forward_intermediates(tokens, indices=[last_but_one], output_fmt="NLC")  # type: ignore[operator]
    return found


def sdxl_refiner(
    name: str, weights: Path | None = None, random_seed: int | None = None, dtype: torch.dtype = torch.float32
) -> Refiner:
    """Return SDXL with its two prompts encoded, frozen, on the CPU.

    Args:
        name: of :data:`benchmark.weights.DOWNLOADS`.
        weights: folder of the weights files.
        random_seed: draw the weights instead.
        dtype: of the UNet's weights.

    Raises:
        UserError: the file is missing or does not fit.
    """
    clip_l = text_tower(CLIP_L, quick=True, projected=False)
    bigg = text_tower(CLIP_BIGG, quick=False, projected=True)
    unet, vae = build_unet(SDXL_UNET), build_vae()
    if random_seed is not None:
        for part, of in ((unet, "unet"), (vae, "vae"), (clip_l, "clip-l"), (bigg, "bigg")):
            seeded(part, f"{name} {of}", random_seed, dtype if part is unet else torch.float32)
    else:
        path, what = weights_file(name, weights), DOWNLOADS[name].title
        read_unet(unet, path, what, SDXL_UNET, dtype)
        read_vae(vae, path, what)
        load_weights(clip_l, path, what, only=(_CLIP_L_PREFIX,), convert=clip_l_names)
        load_weights(bigg, path, what, only=(_BIGG_PREFIX,), convert=bigg_names)
    for part in (unet, vae, clip_l, bigg):
        part.eval().requires_grad_(False)
    prompts = [encode_prompt(clip_l, bigg, text) for text in (PROMPT, NEGATIVE_PROMPT)]
    return Refiner(vae, unet, *prompts)  # type: ignore[arg-type]
