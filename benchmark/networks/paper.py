"""The frozen networks that Brain-IT's targets come from: DINOv2 ViT-L/14, VGG-16-BN, OpenCLIP ViT-bigG/14.

Each takes RGB in [0, 1] and takes out mean and deviation itself. Architectures are timm's, torchvision's and
open_clip's; weights are read from files as their publishers serve them (``benchmark.weights.DOWNLOADS``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from benchmark.networks.files import load_weights
from benchmark.networks.scoring import CLIP, IMAGENET, ScoringNetwork
from benchmark.networks.seeded import seeded
from benchmark.weights import DOWNLOADS, weights_file
from methods.brain_it.encoder import TappedBackbone

ClipInput = Literal["mindeye2", "standard"]
"""What the semantic network sees of an image x in [0, 1]: (x + 1) / 2 as MindEye2 and Brain-IT feed it, or x itself."""

DINO_SIZE, DINO_REGISTERS = 224, 4
BIGG_SIZE = 224


class Vgg16Bn(ScoringNetwork):
    """torchvision's VGG-16 with batch norm. Layers: ``0`` .. ``43``, the outputs of ``features`` (maps).

    Brain-IT reads 5, 12, 22, 32 and 42: the ReLUs of conv1_2, 2_2, 3_3, 4_3 and 5_3 (App. D.1; indices from the
    official code).
    """

    LAYERS = tuple(str(k) for k in range(44))
    UNUSED = ("classifier.",)

    @staticmethod
    def build() -> nn.Module:
        """Return the convolutions."""
        from torchvision.models import vgg16_bn

        net = vgg16_bn(weights=None, init_weights=False)
        net.classifier = nn.Identity()
        return net

    def taps(self, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return ``layers`` of normalised images, and compute nothing beyond the last of them."""
        found: dict[str, Tensor] = {}
        for k, module in enumerate(cast("nn.Sequential", self.net.features)):
            # Out of place: an in-place ReLU would overwrite the map before it, which may be asked for too.
            x = torch.relu(x) if isinstance(module, nn.ReLU) else module(x)
            if str(k) in layers:
                found[str(k)] = x
                if len(found) == len(set(layers)):
                    break
        return found


class _DinoStem(nn.Module):
    """What comes before DINOv2's first block: images (B, 3, 224, 224) in [0, 1] -> tokens [CLS, registers, patches]."""

    mean: Tensor
    std: Tensor

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.norm_pre = vit.patch_embed, vit.norm_pre
        self.cls_token, self.reg_token, self.pos_embed = (
            cast("nn.Parameter", token) for token in (vit.cls_token, vit.reg_token, vit.pos_embed)
        )
        mean, std = (torch.tensor(values, device="cpu")[:, None, None] for values in IMAGENET)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Positions are added to the patches alone: the file's sum for CLS is in its token already."""
        x = cast("nn.Module", self.patch_embed)((images - self.mean) / self.std) + self.pos_embed
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token)]
        tokens: Tensor = cast("nn.Module", self.norm_pre)(torch.cat([*prefix, x], dim=1))
        return tokens


def dino_backbone(
    name: str,
    taps: Sequence[int],
    adapter_rank: int,
    grid: int,
    weights: Path | None = None,
    random_seed: int | None = None,
) -> TappedBackbone:
    """Return DINOv2 ViT-L/14 with 4 registers, read after blocks ``taps`` (Brain-IT: 1, 6, 12, 18, 24), no final norm.

    Args:
        name: the network, of :data:`benchmark.weights.DOWNLOADS`.
        taps: block numbers from 1.
        adapter_rank: of the trained residual adapter after every block (Brain-IT: 7); 0 for none.
        grid: must be 16, the patches on a side of 224 pixels.
        weights: folder of the weights files.
        random_seed: draw the weights instead, for tests and dry runs.

    Raises:
        UserError: the file is missing or does not fit.
        ValueError: another grid.
    """
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    if grid != DINO_SIZE // 14:
        raise ValueError(f"encoder.grid is {grid}; {name} has {DINO_SIZE // 14} patches on a side")
    with torch.device("meta"):
        vit = timm.create_model("vit_large_patch14_reg4_dinov2", img_size=DINO_SIZE, num_classes=0)
    if random_seed is not None:
        seeded(vit, name, random_seed)
    else:
        # timm's filter takes its own names as well as DINOv2's, and resamples the positions of 518 pixels to 224.
        load_weights(
            vit,
            weights_file(name, weights),
            DOWNLOADS[name].title,
            convert=lambda found: checkpoint_filter_fn(found, vit),
        )
    backbone = TappedBackbone(
        _DinoStem(vit),
        list(cast("nn.Sequential", vit.blocks)),
        [cast("int", vit.embed_dim)] * len(cast("nn.Sequential", vit.blocks)),
        taps,
        rank=adapter_rank,
        grid=grid,
        cls_token=True,
        n_registers=DINO_REGISTERS,
    )
    return backbone


def vgg16_bn(name: str, weights: Path | None = None, random_seed: int | None = None) -> Vgg16Bn:
    """Return VGG-16-BN, frozen.

    Raises:
        UserError: the file is missing or does not fit.
    """
    return Vgg16Bn.loaded(name, weights, random_seed)


class ClipTokens(nn.Module):
    """Patch tokens of a CLIP image tower: after its last layer norm, before the projection, without CLS.

    Args:
        tower: open_clip's ``VisionTransformer`` that gives out its tokens.
        clip_input: see :data:`ClipInput`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, clip_input: ClipInput = "mindeye2") -> None:
        super().__init__()
        self.tower, self.clip_input, self.input_size = tower, clip_input, BIGG_SIZE
        mean, std = (torch.tensor(values, device="cpu")[:, None, None] for values in CLIP)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def train(self, mode: bool = True) -> ClipTokens:
        """Stay in evaluation mode whatever the surrounding model does."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, 256, 1664) tokens of ``images`` (B, 3, 224, 224) in [0, 1], in the tower's precision."""
        if self.clip_input == "mindeye2":
            images = (images + 1) / 2
        pixels = ((images - self.mean) / self.std).to(next(self.tower.parameters()).dtype)
        tokens: Tensor = self.tower(pixels)[1]
        return tokens


def bigg_tokens(
    name: str,
    weights: Path | None = None,
    random_seed: int | None = None,
    clip_input: ClipInput = "mindeye2",
    dtype: torch.dtype = torch.float32,
) -> ClipTokens:
    """Return the patch tokens of OpenCLIP ViT-bigG/14 (``laion2b_s39b_b160k``): 256 of 1664 numbers (Sec. 3.2).

    Args:
        name: the network, of :data:`benchmark.weights.DOWNLOADS`.
        weights: folder of the weights files. The image tower is read alone, from a file of the whole model too.
        random_seed: draw the weights instead.
        clip_input: see :data:`ClipInput`.
        dtype: in which the 1.8 billion weights are kept.

    Raises:
        UserError: the file is missing or does not fit.
    """
    import open_clip
    from open_clip.transformer import VisionTransformer

    config = open_clip.get_model_config("ViT-bigG-14")
    vision = config["vision_cfg"]
    with torch.device("meta"):
        tower = VisionTransformer(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["width"],
            layers=vision["layers"],
            heads=vision["width"] // vision["head_width"],
            mlp_ratio=vision["mlp_ratio"],
            output_dim=config["embed_dim"],
            output_tokens=True,
        )
    model = nn.ModuleDict({"visual": tower})
    if random_seed is not None:
        seeded(model, name, random_seed, dtype)
    else:
        # The file's other half is the text tower.
        unused = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_")
        load_weights(model, weights_file(name, weights), DOWNLOADS[name].title, unused, dtype=dtype)
    tokens = ClipTokens(tower, clip_input)
    tokens.eval().requires_grad_(False)
    return tokens
