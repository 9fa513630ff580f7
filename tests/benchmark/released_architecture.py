"""The released models, built from their description, and pickled as their authors did: with their classes' names.

Decoder: PyG's ``TransformerConv`` on one homogeneous graph (an example's voxels, then the clusters; edges from each
voxel to its cluster), ReLU, LayerNorm, then self- and cross-attention blocks. Encoder: a DINOv2 with registers in the
names of its hub, a low-rank adapter after every block, and readers of a few of them. Joint model: a Lightning
checkpoint of the decoder beside a diffusion engine. Sizes are arguments; weights are seeded.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.nn import TransformerConv

DECODER, LAYERS, ENCODER = "models.decoder_models", "models.layers_transformer", "models.encoder_models"
READERS, DINO = "models.layers_encoder", "dinov2.models.vision_transformer"
_CLASSES: dict[str, list[type]] = {}


def of(module: str) -> Any:
    """Let a class claim that it is from ``module``, as the authors' were."""

    def claim(cls: type) -> type:
        cls.__module__ = module
        _CLASSES.setdefault(module, []).append(cls)
        return cls

    return claim


@contextmanager
def importable() -> Iterator[None]:
    """Make the claimed modules exist while something is pickled (or unpickled by torch itself)."""
    packages = {".".join(name.split(".")[:depth]) for name in _CLASSES for depth in range(1, name.count(".") + 1)}
    modules = {name: ModuleType(name) for name in (*packages, *_CLASSES)}
    for name, classes in _CLASSES.items():
        vars(modules[name]).update({cls.__name__: cls for cls in classes})
    assert not modules.keys() & sys.modules.keys()
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def save(value: object, path: Any, **options: Any) -> None:
    with importable():
        torch.save(value, path, **options)


def seeded(module: nn.Module, seed: int) -> Any:
    """Draw all parameters anew, so that none is at a special value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


# --- Decoder ----------------------------------------------------------------------------------------------------------


@of(DECODER)
class dec_param:  # noqa: N801 (the authors' name)
    def __init__(self, voxels: int, clusters: int, tokens: int, out_dim: int, dim: int, depth: int, heads: int) -> None:
        self.num_voxels = np.array([voxels]).sum()  # a number of numpy, as theirs is
        self.embed_dim_vox, self.init, self.out_dim = dim, 0.1, out_dim
        self.num_centers, self.heads, self.out_tokens = clusters, heads, tokens
        self.num_blocks, self.xformers = depth, True


@of(LAYERS)
class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = (
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, dim),
            nn.Dropout(0),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Attends(nn.Module):
    """Plain softmax attention; the scale is one over the root of a head's width."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, dim // num_heads, (dim // num_heads) ** -0.5

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).movedim(2, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weight = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale, dim=-1)
        return torch.einsum("bhqk,bhkd->bqhd", weight, v).flatten(2)


@of(LAYERS)
class XformerAttention(_Attends):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(*map(self.heads, self.qkv(x).split(x.shape[-1], dim=-1))))


@of(LAYERS)
class XformerCrossAttention(_Attends):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.kv, self.proj = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        k, v = map(self.heads, self.kv(x).split(x.shape[-1], dim=-1))
        return self.proj(self.attend(self.heads(query), k, v))


@of(LAYERS)
class Block_xformer(nn.Module):  # noqa: N801
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path = nn.LayerNorm(dim), XformerAttention(dim, num_heads), nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@of(LAYERS)
class BlockCross_xformer(nn.Module):  # noqa: N801
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path = nn.LayerNorm(dim), XformerCrossAttention(dim, num_heads), nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        y = self.attn(query, self.norm1(x))  # the query comes as it is
        return y + self.mlp(self.norm2(y))


@of(DECODER)
class Decoder(nn.Module):
    def __init__(self, param: dec_param) -> None:
        super().__init__()
        dim = param.embed_dim_vox
        self.param, self.conv_layer = param, TransformerConv  # a class as an attribute, as theirs
        self.voxel_embed = nn.Parameter(torch.randn(int(param.num_voxels), dim))
        self.centers = nn.Parameter(torch.randn(param.num_centers, dim))
        self.pred_tokens = nn.Parameter(torch.randn(param.out_tokens, dim))
        self.conv_centers = self.conv_layer(dim, dim)
        self.relu, self.norm_centers, self.proj = nn.ReLU(), nn.LayerNorm(dim), nn.Linear(dim, param.out_dim)
        self.blocks = nn.ModuleList(Block_xformer(dim, param.heads) for _ in range(param.num_blocks))
        self.block_crosses = nn.ModuleList(BlockCross_xformer(dim, param.heads) for _ in range(param.num_blocks + 1))

    def forward(self, x: Tensor, voxel: Tensor, edges: Tensor) -> Tensor:
        """x, voxel: B x N activations and rows of the voxel table; edges: 2 x E between the B (N + C) nodes."""
        modulated = x.unsqueeze(-1) * self.voxel_embed[voxel]
        nodes = torch.cat([modulated, self.centers.expand(len(x), -1, -1)], dim=1)
        z = self.conv_centers(nodes.flatten(0, 1), edges).view_as(nodes)[:, x.shape[1] :]
        z = self.norm_centers(self.relu(z))
        q = self.pred_tokens.expand(len(x), -1, -1)
        q = q + self.block_crosses[0](z, q)
        for block, cross in zip(self.blocks, self.block_crosses[1:], strict=True):
            z = block(z)
            q = q + cross(z, q)
        return self.proj(q)


def edges(table: np.ndarray, voxels: Sequence[np.ndarray]) -> Tensor:
    """The released graph of a batch: ``table`` is clusters x largest cluster, padded with -1; B lists of N voxels each.

    A voxel that is drawn twice is two nodes, and only the last of them has an edge.
    """
    starts, ends = [], []
    for example, drawn in enumerate(voxels):
        first = example * (len(drawn) + len(table))
        node = {int(voxel): place for place, voxel in enumerate(drawn)}
        for cluster, members in enumerate(table):
            for voxel in members:
                if int(voxel) in node:
                    starts.append(first + node[int(voxel)])
                    ends.append(first + len(drawn) + cluster)
    return torch.tensor([starts, ends])


# --- Encoder ----------------------------------------------------------------------------------------------------------


@of(ENCODER)
class encoder_param:  # noqa: N801
    def __init__(self, voxels: int, inner: int, embed_dim: int, width: int, positions: int) -> None:
        self.num_voxels, self.inner_ch, self.embed_dim_vox = np.int64(voxels), inner, embed_dim
        self.drop_out, self.embed_dim, self.init, self.img_len = 0.25, 32, 0.1, 224
        self.in_channels, self.in_spatial = width, positions


@of(READERS)
class MapAttention_dynamic_pos(nn.Module):  # noqa: N801
    def __init__(self, embed_dim: int, inner: int) -> None:
        super().__init__()
        self.num_heads, self.l1, self.sqrt_dim, self.softmax = 1, 0, np.sqrt(embed_dim), True
        self.project, self.project_x = nn.Linear(embed_dim, embed_dim), nn.Linear(inner, embed_dim)

    def forward(self, voxel: Tensor, position: Tensor, f: Tensor) -> Tensor:
        keys = self.project_x(f) + position
        return torch.softmax(torch.einsum("bve,bpe->bvp", self.project(voxel), keys), dim=-1) @ f


@of(DINO)
class PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch_size, self.proj, self.norm = (patch, patch), nn.Conv2d(3, width, patch, patch), nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


@of(DINO)
class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@of(DINO)
class MemEffAttention(_Attends):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(*map(self.heads, self.qkv(x).split(x.shape[-1], dim=-1))))


@of(DINO)
class NestedTensorBlock(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = (
            nn.LayerNorm(width, 1e-6),
            MemEffAttention(width, num_heads),
            LayerScale(width),
        )
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width, 1e-6), Mlp(width, 4 * width), LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


@of(DINO)
class DinoVisionTransformer(nn.Module):
    def __init__(self, grid: int, width: int, depth: int, num_heads: int, registers: int, patch: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.blocks = nn.ModuleList(NestedTensorBlock(width, num_heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width, 1e-6), nn.Identity()

    def tokens(self, images: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1) + self.pos_embed
        return torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)


@of(ENCODER)
class Encoder(nn.Module):
    def __init__(
        self, param: encoder_param, model: DinoVisionTransformer, select_layers: list[int], r: int, alpha: float
    ) -> None:
        super().__init__()
        self.param, self.select_layers, self.r, self.lora_scale = param, select_layers, r, alpha / r
        self.num_embeds, self.num_layers, self.total_num_layers = 3, len(select_layers), len(model.blocks)
        self.include_reg_tokens, self.num_reg_tokens = False, model.register_tokens.shape[1]
        self.embed_model = model
        taps, width, inner, embed = len(select_layers), param.in_channels, param.inner_ch, param.embed_dim_vox
        self.voxel_embed = nn.Parameter(torch.randn(int(param.num_voxels), embed))
        self.layer_embed = nn.Parameter(torch.randn(embed, taps))  # theirs has it, and does not use it
        self.feat_embed = nn.Parameter(torch.randn(embed, inner * taps))
        self.pos_embed = nn.Parameter(torch.randn(param.in_spatial, embed))
        self.in_project = nn.ModuleList(nn.Linear(width, inner) for _ in range(taps))
        self.norm_in = nn.ModuleList(nn.LayerNorm(width) for _ in range(taps))
        self.norm = nn.ModuleList(nn.LayerNorm(inner) for _ in range(taps))
        self.map_att = nn.ModuleList(MapAttention_dynamic_pos(embed, inner) for _ in range(taps))
        self.mlp = nn.ModuleList(Mlp(inner, 4 * inner) for _ in range(taps))
        self.DO = nn.ModuleList(nn.Dropout(param.drop_out) for _ in range(taps))
        self.lora_A = nn.ModuleList(nn.Linear(r, width, bias=False) for _ in model.blocks)
        self.lora_B = nn.ModuleList(nn.Linear(width, r, bias=False) for _ in model.blocks)

    def forward(self, images: Tensor, voxel: Tensor) -> Tensor:
        """B x 3 x H x W images and B x V rows of the voxel table to B x V activities."""
        e, x, found = self.voxel_embed[voxel], self.embed_model.tokens(images), []
        for number, block in enumerate(self.embed_model.blocks, start=1):
            x = block(x)
            x = x + self.lora_scale * self.lora_A[number - 1](self.lora_B[number - 1](x))
            if number in self.select_layers:
                i = self.select_layers.index(number)
                kept = torch.cat([x[:, :1], x[:, 1 + self.num_reg_tokens :]], dim=1)
                f = self.in_project[i](self.norm_in[i](kept))
                y = self.DO[i](self.norm[i](self.map_att[i](e, self.pos_embed, f)))
                found.append(y + self.mlp[i](y))
        return (torch.cat(found, dim=-1) * (e @ self.feat_embed)).sum(-1)


# --- Joint model ------------------------------------------------------------------------------------------------------


def sgm_name(name: str, config: Mapping[str, Any]) -> str:
    """The name that Stability's code gives to a tensor of diffusers' ``UNet2DConditionModel``."""
    blocks = config["layers_per_block"]
    depths = [
        config["transformer_layers_per_block"][i] * ("Cross" in t) for i, t in enumerate(config["down_block_types"])
    ]
    for ours, theirs in (
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^time_embedding\.linear_(\d)\.", lambda m: f"time_embed.{2 * int(m[1]) - 2}."),
        (r"^class_embedding\.linear_(\d)\.", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}."),
        (r"^mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^down_blocks\.(\d)\.(?:resnets|attentions)\.(\d)\.", lambda m: _down(m, blocks)),
        (
            r"^down_blocks\.(\d)\.downsamplers\.0\.conv\.",
            lambda m: f"input_blocks.{(int(m[1]) + 1) * (blocks + 1)}.0.op.",
        ),
        (r"^up_blocks\.(\d)\.(?:resnets|attentions)\.(\d)\.", lambda m: _up(m, blocks)),
        (
            r"^up_blocks\.(\d)\.upsamplers\.0\.conv\.",
            lambda m: f"output_blocks.{int(m[1]) * (blocks + 1) + blocks}.{1 + (depths[::-1][int(m[1])] > 0)}.conv.",
        ),
        (r"\.norm1\.", ".in_layers.0."),
        (r"\.conv1\.", ".in_layers.2."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"\.norm2\.", ".out_layers.0."),
        (r"\.conv2\.", ".out_layers.3."),
        (r"\.conv_shortcut\.", ".skip_connection."),
    ):
        if "transformer_blocks" in name and theirs in (".in_layers.0.", ".out_layers.0."):
            continue  # a transformer block's own norms
        name = re.sub(ours, theirs, name)
    return name


def _down(m: re.Match[str], blocks: int) -> str:
    return f"input_blocks.{1 + int(m[1]) * (blocks + 1) + int(m[2])}.{int('attentions' in m[0])}."


def _up(m: re.Match[str], blocks: int) -> str:
    return f"output_blocks.{int(m[1]) * (blocks + 1) + int(m[2])}.{int('attentions' in m[0])}."


def lightning_checkpoint(decoder: Decoder, unet: Mapping[str, Tensor], sigmas: Tensor) -> dict[str, Any]:
    """What Lightning saved of the joint model: its own state dict is two state dicts."""
    engine = OrderedDict((f"model.diffusion_model.{name}", value) for name, value in unet.items())
    engine["denoiser.sigmas"] = sigmas
    engine["first_stage_model.encoder.conv_in.weight"] = torch.randn(4, 3, 3, 3)
    engine["conditioner.embedders.0.model.visual.class_embedding"] = torch.randn(8)
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 4)} for i in range(3)}
    return {
        "epoch": 9,
        "global_step": 1234,
        "pytorch-lightning_version": "2.0.1",
        "state_dict": {"diffusion_engine": engine, "gnn_model": decoder.state_dict()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 10, "completed": 9}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.tensor(0.5), "dirpath": "x"}
        },
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-5, "params": [0, 1, 2]}]}],
        "lr_schedulers": [{"base_lrs": [1e-5], "lr_lambdas": [None]}],
    }
