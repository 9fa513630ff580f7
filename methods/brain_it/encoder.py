"""The Universal Brain Encoder: from an image to the activity of every voxel of every subject.

Beliy et al. 2024 ("The Wisdom of a Crowd of Brains", arXiv 2406.12179), as Brain-IT uses it (details of the official
code). All that is particular to a voxel is one vector ``e_v``; everything else is shared by all voxels of all subjects,
which is why the vectors can later be clustered across subjects (`methods.brain_it.clustering`).

Two modules, so that the frozen and the trained parts can be handled apart:

1. `TappedBackbone` runs frozen image blocks with a small trained residual adapter after each, and hands out the
   activations ("taps") of a few of them. In the paper: DINOv2 ViT-L/14 with registers, tapped after blocks 1, 6, 12, 18
   and 24. With rank 0 it has nothing to train, and its features can be computed once and kept.
2. `BrainEncoder` turns the tapped features into voxel activity. For tap ``i`` with tokens ``f`` and voxel ``v``::

       f       = Linear_i(LayerNorm_i(tokens))                                   inner dimensions
       a_vp    = softmax_p((Wq_i e_v + bq_i) . (Wk_i f_p + bk_i + pos_p))        where the voxel looks; no 1/sqrt(d)
       x_vi    = block_i(sum_p a_vp f_p)      block: LayerNorm, Dropout, x + MLP(x)
       y_v     = sum_i (e_v^T F_i) . x_vi                                        what the voxel reads there

Subjects are 0-based positions in the list of voxel counts; voxels are rows of one table, subject after subject.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Elements that one intermediate tensor of `BrainEncoder.predict` may have: 2**20 floats (4 MB) stay in a core's cache.
_PREDICT_ELEMENTS_CPU = 2**20
_PREDICT_ELEMENTS_GPU = 2**27


class Adapter(nn.Module):
    """Low-rank residual correction of a block's output: x + (alpha / rank) * A(B(x)) (official code).

    It starts as the identity (B is zero). Works over the last axis of tokens (B, P, C) and axis 1 of maps (B, C, H, W).
    """

    def __init__(self, channels: int, rank: int = 7, alpha: float = 0.01) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.zeros(rank, channels))  # B
        self.up = nn.Parameter(torch.empty(channels, rank))  # A
        nn.init.kaiming_uniform_(self.up, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the corrected activations, of the shape of ``x``."""
        if x.ndim == 4:
            low = F.conv2d(x, self.down[:, :, None, None])
            return x + self.scale * F.conv2d(low, self.up[:, :, None, None])
        return x + self.scale * F.linear(F.linear(x, self.down), self.up)


class TappedBackbone(nn.Module):
    """Frozen image blocks with trained adapters between them, read out at several depths.

    Blocks after the last tap are left out: nothing would read them. The blocks (and the stem, if it is a module) are
    frozen in place and stay in evaluation mode, whatever `train` says. Only the adapters have parameters that require
    gradients, and `adapters.state_dict()` is all that needs saving.

    Args:
        stem: what comes before the first block: images (B, 3, H, W) -> tokens (B, P, C) or maps (B, C, H, W). A module
            is frozen and moved to devices with the rest; a plain function has to see to that itself.
        blocks: the frozen blocks, in order, each a map from tokens to tokens or from maps to maps.
        channels: output channels of each block.
        taps: the blocks to read, 1-based, ascending (the paper: 1, 6, 12, 18, 24).
        rank: rank of the adapters; 0 for none.
        alpha: scale of the adapters before division by the rank.
        grid: maps are average-pooled to grid x grid and read row by row, so that all taps have P = grid^2 positions.
        cls_token: tokens start with a CLS token, which is kept as position 0.
        n_registers: register tokens after the CLS token (or at the start): dropped at the taps, not between blocks.

    Attributes:
        checkpointing: compute a block's activations again in the backward pass instead of keeping them.

    Raises:
        ValueError: taps out of range or not ascending, or not one channel count a block.
    """

    def __init__(
        self,
        stem: Callable[[Tensor], Tensor],
        blocks: Sequence[nn.Module],
        channels: Sequence[int],
        taps: Sequence[int],
        *,
        rank: int = 7,
        alpha: float = 0.01,
        grid: int = 8,
        cls_token: bool = False,
        n_registers: int = 0,
    ) -> None:
        super().__init__()
        if len(channels) != len(blocks):
            raise ValueError(
                f"TappedBackbone: {len(blocks)} blocks but {len(channels)} channel counts; give one a block"
            )
        if not taps or list(taps) != sorted(set(taps)) or taps[0] < 1 or taps[-1] > len(blocks):
            raise ValueError(f"TappedBackbone: taps {list(taps)}; expected ascending block numbers in 1..{len(blocks)}")
        if rank < 0 or grid < 1 or n_registers < 0:
            raise ValueError(
                f"TappedBackbone: rank {rank}, grid {grid}, n_registers {n_registers}; expected >= 0, >= 1, >= 0"
            )
        self.taps = tuple(taps)
        self.tap_channels = tuple(channels[tap - 1] for tap in taps)
        self.grid = grid
        self.cls_token = cls_token
        self.n_registers = n_registers
        self.checkpointing = False
        self.stem = stem
        self.blocks = nn.ModuleList(blocks[: taps[-1]])
        self.requires_grad_(False)
        self.adapters = nn.ModuleList([Adapter(c, rank, alpha) for c in channels[: taps[-1]]] if rank else [])
        self.train(self.training)

    @property
    def is_static(self) -> bool:
        """Whether nothing is trained here (rank 0), so that features of an image can be computed once and kept."""
        return len(self.adapters) == 0

    def train(self, mode: bool = True) -> TappedBackbone:
        """Set the mode, except of the frozen part: its batch statistics and stochastic depth stay as in evaluation."""
        super().train(mode)
        self.blocks.eval()
        if isinstance(self.stem, nn.Module):
            self.stem.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one (B, P, C_i) tensor a tap for images (B, 3, H, W), prepared as the frozen network expects them."""
        x = self.stem(images)
        features = []
        for number in range(1, len(self.blocks) + 1):
            if self.checkpointing and torch.is_grad_enabled() and not self.is_static:
                x = checkpoint(self._block, number, x, use_reentrant=False)
            else:
                x = self._block(number, x)
            if number in self.taps:
                features.append(self._tokens(x))
        return features

    def _block(self, number: int, x: Tensor) -> Tensor:
        x = self.blocks[number - 1](x)
        return x if self.is_static else self.adapters[number - 1](x)

    def _tokens(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return F.adaptive_avg_pool2d(x, self.grid).flatten(2).transpose(1, 2)
        first = int(self.cls_token)
        if self.n_registers == 0:
            return x
        return torch.cat([x[:, :first], x[:, first + self.n_registers :]], dim=1)


class _Scene(NamedTuple):
    """What a tap has to say about a batch of images, before any voxel looks at it."""

    values: Tensor  # (B, P, inner): f
    keys: Tensor  # (B, P, embed): Wq^T k_p, with k_p = Wk f_p + bk + pos_p
    offsets: Tensor  # (B, 1, P): bq . k_p


class _TapReader(nn.Module):
    """Spatial attention and MLP of one tap: where each voxel looks, and what it finds there."""

    def __init__(self, channels: int, embed_dim: int, inner: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.reduce = nn.Linear(channels, inner)
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(inner, embed_dim)
        self.pooled_norm = nn.LayerNorm(inner)
        self.dropout = nn.Dropout(dropout)
        self.hidden = round(inner * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(inner, self.hidden), nn.GELU(), nn.Linear(self.hidden, inner))

    def scene(self, tokens: Tensor, position: Tensor) -> _Scene:
        # (Wq e + bq) . k = e . (Wq^T k) + bq . k: applying the query's weights to the P keys instead of the V voxels
        # gives the same scores, and P is far smaller than V.
        values = self.reduce(self.norm(tokens))
        keys = self.key(values) + position
        return _Scene(values, keys @ self.query.weight, (keys @ self.query.bias).unsqueeze(1))

    def forward(self, scene: _Scene, embedding: Tensor) -> Tensor:
        """Return (B, V, inner) for voxel embeddings (B, V, embed)."""
        attention = torch.baddbmm(scene.offsets, embedding, scene.keys.transpose(1, 2)).softmax(dim=-1)
        x = self.dropout(self.pooled_norm(attention @ scene.values))
        return x + self.mlp(x)


class BrainEncoder(nn.Module):
    """Voxel activity from tapped image features (equations in the module's docstring). Defaults are the paper's.

    Args:
        voxel_counts: voxels of each subject; rows of the voxel table follow in this order.
        tap_channels: channels C_i of each tap.
        n_positions: positions P of every tap (257 for ViT-L/14 at 224: CLS and 16 x 16).
        embed_dim: length of a voxel embedding.
        inner: channels a voxel reads from each tap.
        mlp_ratio: hidden over inner channels in the MLP.
        dropout: on the pooled features, while training.

    Attributes:
        voxel_embedding: (sum of voxel_counts, embed_dim), starts as N(0, 1) * 0.1 / (2 sqrt(embed_dim)).
        position: (P, embed_dim), shared by all taps, starts as N(0, 1) / (2 sqrt(32)).
        readout: F of all taps, (embed_dim, taps * inner), starts as N(0, 1) / (2 sqrt(32)).

    Raises:
        ValueError: empty or non-positive sizes.
    """

    def __init__(
        self,
        voxel_counts: Sequence[int],
        tap_channels: Sequence[int],
        n_positions: int,
        *,
        embed_dim: int = 256,
        inner: int = 128,
        mlp_ratio: float = 4.0,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if not voxel_counts or min(voxel_counts) < 1:
            raise ValueError(f"BrainEncoder: voxel_counts {list(voxel_counts)}; expected one positive count a subject")
        if not tap_channels or min(*tap_channels, n_positions, embed_dim, inner) < 1:
            raise ValueError(
                f"BrainEncoder: tap_channels {list(tap_channels)}, n_positions {n_positions}, embed_dim {embed_dim}, "
                f"inner {inner}; expected at least one tap and positive sizes"
            )
        self.voxel_counts = tuple(voxel_counts)
        self.tap_channels = tuple(tap_channels)
        self.n_positions = n_positions
        self.voxel_embedding = nn.Parameter(
            torch.randn(sum(voxel_counts), embed_dim) * 0.1 / (2 * math.sqrt(embed_dim))
        )
        # 32 is the official constant, not a size of the model.
        self.position = nn.Parameter(torch.randn(n_positions, embed_dim) / (2 * math.sqrt(32)))
        self.readout = nn.Parameter(torch.randn(embed_dim, len(tap_channels) * inner) / (2 * math.sqrt(32)))
        self.readers = nn.ModuleList(_TapReader(c, embed_dim, inner, mlp_ratio, dropout) for c in tap_channels)

    def subject_slice(self, subject: int) -> slice:
        """Return the rows of the voxel table that belong to a subject (0-based).

        Raises:
            ValueError: no such subject.
        """
        if not 0 <= subject < len(self.voxel_counts):
            raise ValueError(f"BrainEncoder: no subject {subject}; expected 0..{len(self.voxel_counts) - 1}")
        ends = list(accumulate(self.voxel_counts, initial=0))
        return slice(ends[subject], ends[subject + 1])

    def forward(self, features: Sequence[Tensor], voxels: Tensor) -> Tensor:
        """Return the activity (B, V) of some voxels.

        Args:
            features: one (B, P, C_i) tensor a tap.
            voxels: int64 rows of the voxel table: (B, V), a list for each image, or (V,) or (1, V), one list for all.

        Raises:
            ValueError: features or voxels of another shape.
        """
        scenes = self._scenes(features)
        batch = len(features[0])
        if voxels.ndim not in (1, 2) or (voxels.ndim == 2 and len(voxels) not in (1, batch)):
            raise ValueError(f"BrainEncoder: voxels {tuple(voxels.shape)}; expected ({batch}, V), (1, V) or (V,)")
        embedding = F.embedding(voxels if voxels.ndim == 2 else voxels.unsqueeze(0), self.voxel_embedding)
        return self._read(scenes, embedding, batch)

    @torch.no_grad()
    def predict(self, features: Sequence[Tensor], subject: int, chunk: int | None = None) -> Tensor:
        """Return the activity (B, V_s) of all voxels of a subject (0-based), without dropout and gradients.

        Voxels are read ``chunk`` at a time (default: as many as keep every intermediate small), to bound the memory.

        Raises:
            ValueError: no such subject, or features of another shape.
        """
        embedding = self.voxel_embedding[self.subject_slice(subject)].unsqueeze(0)
        training = self.training
        self.eval()
        try:
            scenes = self._scenes(features)
            batch = len(features[0])
            if chunk is None:
                widest = max(self.n_positions, self._readers()[0].hidden)
                elements = _PREDICT_ELEMENTS_GPU if embedding.is_cuda else _PREDICT_ELEMENTS_CPU
                chunk = max(1, elements // (batch * widest))
            return torch.cat([self._read(scenes, part, batch) for part in embedding.split(chunk, dim=1)], dim=1)
        finally:
            self.train(training)

    def _readers(self) -> list[_TapReader]:
        return cast("list[_TapReader]", list(self.readers))

    def _scenes(self, features: Sequence[Tensor]) -> list[_Scene]:
        batch = len(features[0]) if len(features) else 0
        expected = [(batch, self.n_positions, c) for c in self.tap_channels]
        if [tuple(f.shape) for f in features] != expected:
            raise ValueError(
                f"BrainEncoder: features {[tuple(f.shape) for f in features]}; expected (B, {self.n_positions}, C) "
                f"with C = {list(self.tap_channels)}"
            )
        return [reader.scene(f, self.position) for reader, f in zip(self._readers(), features, strict=True)]

    def _read(self, scenes: Sequence[_Scene], embedding: Tensor, batch: int) -> Tensor:
        # embedding is (B, V, E), or (1, V, E) for voxels common to the batch: then the weights are computed once.
        weights = (embedding @ self.readout).chunk(len(self.readers), dim=-1)
        embedding = embedding.expand(batch, -1, -1)
        # The dot product over the concatenated taps, tap by tap.
        activity = torch.zeros((), device=embedding.device)
        for reader, scene, weight in zip(self._readers(), scenes, weights, strict=True):
            activity = activity + (reader(scene, embedding) * weight).sum(dim=-1)
        return activity


def shift_augment(images: Tensor, max_shift: int = 3, generator: torch.Generator | None = None) -> Tensor:
    """Shift every image by its own whole number of pixels, up to ``max_shift`` in each axis (official code).

    Pixels that come in from outside repeat the nearest edge pixel.

    Args:
        images: (B, C, H, W), any dtype.
        max_shift: largest shift in pixels.
        generator: source of the shifts, on the CPU.

    Raises:
        ValueError: images are not 4-D or max_shift is negative.
    """
    if images.ndim != 4 or max_shift < 0:
        raise ValueError(
            f"shift_augment: images {tuple(images.shape)}, max_shift {max_shift}; expected (B, C, H, W) and >= 0"
        )
    batch, _, height, width = images.shape
    dy, dx = torch.randint(-max_shift, max_shift + 1, (2, batch, 1), generator=generator).to(images.device)
    rows = (torch.arange(height, device=images.device) - dy).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - dx).clamp(0, width - 1)
    item = torch.arange(batch, device=images.device)[:, None, None]
    return images.movedim(1, -1)[item, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def voxel_correlation(prediction: Tensor, target: Tensor) -> Tensor:
    """Return Pearson's r of every voxel over images, in float64.

    Call it once a subject and concatenate the results: subjects differ in their voxels and in the images they saw. The
    encoder is chosen by the 75th percentile of these values (official code).

    Images where either value is not finite are left out for that voxel. A voxel with nothing left, or without variance
    in prediction or target, gets 0, never NaN: a prediction that does not vary predicts nothing.

    Args:
        prediction: (n_images, V) of one subject.
        target: (n_images, V) of the same subject.

    Raises:
        ValueError: shapes differ or are not 2-D.
    """
    if prediction.shape != target.shape or prediction.ndim != 2:
        raise ValueError(
            f"voxel_correlation: prediction {tuple(prediction.shape)}, target {tuple(target.shape)}; "
            "expected both (n_images, V)"
        )
    valid = prediction.isfinite() & target.isfinite()
    count = valid.sum(dim=0).clamp(min=1)

    def centred(x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.where(valid, x.double(), 0.0)
        difference = torch.where(valid, x - x.sum(dim=0) / count, 0.0)
        # A constant voxel leaves rounding noise of its mean; only what stands above it is variance.
        noise = torch.finfo(torch.float64).eps * x.abs().amax(dim=0)
        norm = difference.norm(dim=0)
        return difference, torch.where(norm > count * noise, norm, 0.0)

    p, p_norm = centred(prediction)
    t, t_norm = centred(target)
    scale = p_norm * t_norm
    return torch.where(scale > 0, (p * t).sum(dim=0) / scale, 0.0).clamp(-1.0, 1.0)
