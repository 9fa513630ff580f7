"""Which official tensor is which of ours: at the paper's sizes, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from methods.brain_it.encoder import BrainEncoder, TappedBackbone
from methods.brain_it.official import DECODER, ENCODER, Fit, MisfitError, Shape, fit, some, spelled
from methods.brain_it.tokenizer import VoxelLayout
from methods.brain_it.transformer import BIT

VOXELS = (39548, 39548, 39548, 39548, 39548, 39198, 39548, 39511)
N = sum(VOXELS)


def linear(name: str, out: int, inner: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def official_decoder(tokens: int, out: int) -> dict[str, Shape]:
    """The released decoder's tensors: 8 subjects, 128 clusters, width 512, 5 blocks."""
    shapes: dict[str, Shape] = {"voxel_embed": (N, 512), "centers": (128, 512), "pred_tokens": (tokens, 512)}
    for part in ("key", "query", "value", "skip"):
        shapes |= linear(f"conv_centers.lin_{part}", 512, 512)
    shapes |= norm("norm_centers", 512) | linear("proj", out, 512)
    for kind, count, projection, width in (("blocks", 5, "qkv", 1536), ("block_crosses", 6, "kv", 1024)):
        for i in range(count):
            shapes |= norm(f"{kind}.{i}.norm1", 512) | norm(f"{kind}.{i}.norm2", 512)
            shapes |= {f"{kind}.{i}.attn.{projection}.weight": (width, 512)} | linear(f"{kind}.{i}.attn.proj", 512, 512)
            shapes |= linear(f"{kind}.{i}.mlp.fc1", 2048, 512) | linear(f"{kind}.{i}.mlp.fc2", 512, 2048)
    return shapes


def official_encoder() -> dict[str, Shape]:
    """The released encoder's tensors: 8 subjects, 5 taps of a DINOv2 ViT-L/14 with registers, rank 7."""
    shapes: dict[str, Shape] = {"voxel_embed": (N, 256), "layer_embed": (256, 5)}
    shapes |= {"feat_embed": (256, 640), "pos_embed": (257, 256)}
    for i in range(5):
        shapes |= linear(f"in_project.{i}", 128, 1024) | norm(f"norm_in.{i}", 1024) | norm(f"norm.{i}", 128)
        shapes |= linear(f"map_att.{i}.project", 256, 256) | linear(f"map_att.{i}.project_x", 256, 128)
        shapes |= linear(f"mlp.{i}.fc1", 512, 128) | linear(f"mlp.{i}.fc2", 128, 512)
    for i in range(24):
        block = f"embed_model.blocks.{i}"
        shapes |= {f"lora_A.{i}.weight": (1024, 7), f"lora_B.{i}.weight": (7, 1024)}
        shapes |= norm(f"{block}.norm1", 1024) | linear(f"{block}.attn.qkv", 3072, 1024)
        shapes |= linear(f"{block}.attn.proj", 1024, 1024) | {f"{block}.ls1.gamma": (1024,)}
        shapes |= norm(f"{block}.norm2", 1024) | linear(f"{block}.mlp.fc1", 4096, 1024)
        shapes |= linear(f"{block}.mlp.fc2", 1024, 4096) | {f"{block}.ls2.gamma": (1024,)}
    shapes |= {"embed_model.cls_token": (1, 1, 1024), "embed_model.pos_embed": (1, 1370, 1024)}
    shapes |= {"embed_model.register_tokens": (1, 4, 1024), "embed_model.mask_token": (1, 1024)}
    shapes |= {"embed_model.patch_embed.proj.weight": (1024, 3, 14, 14), "embed_model.patch_embed.proj.bias": (1024,)}
    return shapes | norm("embed_model.norm", 1024)


def fitted(shapes: Mapping[str, Shape], settings: Mapping[str, Any] | None = None, **classes: str) -> Fit:
    return fit(shapes, settings or {}, classes, lambda unet: {f"new.{name}": name for name in unet})


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("role", "tokens", "out"), [("lowlevel", 7190, 512), ("semantic", 256, 1664)])
def test_the_paper_s_decoders(role: str, tokens: int, out: int) -> None:
    shapes = official_decoder(tokens, out)
    found = fitted(shapes)
    layout = VoxelLayout.build([np.arange(n) % 128 for n in VOXELS], 128)
    with torch.device("meta"):
        ours = BIT(layout, n_queries=tokens, out_dim=out)
    assert {name: shapes[theirs] for name, theirs in found.names.items()} == shapes_of(ours)
    assert sorted(found.names.values()) == sorted(shapes)
    assert (found.kind, found.role, found.left_out) == ("BIT", role, {})
    assert found.sizes == {
        **{"voxels": N, "clusters": 128, "tokens": tokens, "dim": 512},
        **{"out_dim": out, "hidden": 2048, "depth": 5},
    }


def test_the_paper_s_encoder() -> None:
    shapes = official_encoder()
    found = fitted(shapes, {"select_layers": (1, 6, 12, 18, 24), "lora_scale": 0.01 / 7, "num_reg_tokens": 4})
    with torch.device("meta"):
        backbone = TappedBackbone(nn.Identity(), [nn.Identity()] * 24, [1024] * 24, (1, 6, 12, 18, 24), rank=7)
        ours = BrainEncoder(VOXELS, backbone.tap_channels, 257)
    expected = shapes_of(ours) | {name: s for name, s in shapes_of(backbone).items() if name.startswith("adapters")}
    got = {name: shapes[theirs] for name, theirs in found.names.items()}
    assert {name: s for name, s in got.items() if not name.startswith("backbone.")} == expected
    kept = {name for name in shapes if name.startswith("embed_model.")}
    assert {theirs for name, theirs in found.names.items() if name.startswith("backbone.")} == kept
    assert found.left_out == {"not used by the released forward pass": ["layer_embed"]}
    assert (found.role, found.sizes["rank"], found.sizes["registers"], found.sizes["taps"]) == ("encoder", 7, 4, 5)
    assert found.settings["taps"] == (1, 6, 12, 18, 24)
    # Shared weights outside of backbone and voxel table: a third-party port reports 9.6 MB in float32.
    shared = [s for n, s in shapes.items() if not n.startswith("embed_model.") and n != "voxel_embed"]
    assert round(4 * sum(int(np.prod(s)) for s in shared) / 1e6, 1) == 9.6


def test_the_joint_model() -> None:
    shapes = {f"gnn_model.{name}": shape for name, shape in official_decoder(256, 1664).items()}
    shapes |= {f"diffusion_engine.model.diffusion_model.{name}": (2,) for name in "ab"}
    shapes |= {"diffusion_engine.denoiser.sigmas": (1000,), "diffusion_engine.first_stage_model.x": (1,)}
    shapes |= {"diffusion_engine.conditioner.embedders.0.model.visual.proj": (1664, 1280)}
    found = fitted(shapes)
    assert (found.kind, found.role, found.sizes["tokens"]) == ("joint model", "joint", 256)
    assert found.names["unet.new.a"] == "diffusion_engine.model.diffusion_model.a"
    assert found.names["bit.query_tokens"] == "gnn_model.pred_tokens"
    assert len(found.names) + 3 == len(shapes) and sum(map(len, found.left_out.values())) == 3


@pytest.mark.parametrize("make", [lambda: official_decoder(256, 1664), official_encoder])
def test_other_spellings(make: Any) -> None:
    shapes = make()
    plain = fitted(shapes)
    parallel = fitted({f"module._orig_mod.{name}": shape for name, shape in shapes.items()})
    assert {ours: f"module._orig_mod.{theirs}" for ours, theirs in plain.names.items()} == parallel.names
    chunked = {name.replace("embed_model.blocks.", "embed_model.blocks.0."): shape for name, shape in shapes.items()}
    assert fitted(chunked).names.keys() == plain.names.keys()
    assert spelled("gnn_model.module.centers") == "gnn_model.centers"


@given(st.data())
def test_whatever_is_missing_added_or_reshaped_is_named(data: st.DataObject) -> None:
    make = data.draw(st.sampled_from([lambda: official_decoder(7190, 512), official_encoder]))
    shapes = make()
    name = data.draw(st.sampled_from(sorted(shapes.keys() - {"layer_embed"})))
    kind = data.draw(st.sampled_from(["missing", "unexpected", "wrong shape", "other rank"]))
    if kind == "missing":
        del shapes[name]
    elif kind == "unexpected":
        name = f"{name}.more"
        shapes[name] = (3,)
    elif kind == "wrong shape":
        shapes[name] = (*shapes[name][:-1], shapes[name][-1] + 1)
    else:
        shapes[name] = (*shapes[name], 1)
    with pytest.raises(MisfitError) as caught:
        fitted(shapes)
    told = " ".join(caught.value.problems)
    # A tensor that is the first to tell a size, and tells another, makes those after it look odd: these are named.
    assert name in told or kind == "wrong shape"
    assert kind.replace("other rank", "wrong shape") in told


def test_a_gap_in_the_layers_is_named() -> None:
    shapes = {name: s for name, s in official_decoder(256, 1664).items() if not name.startswith("blocks.2.")}
    with pytest.raises(MisfitError, match=r"missing: blocks\.2\.norm1\.weight, .* and 5 more"):
        fitted(shapes)
    shapes |= {"blocks.999.norm1.weight": (512,), "blocks.123456.norm1.weight": (512,)}
    with pytest.raises(MisfitError, match=r"unexpected: blocks\.123456\.norm1\.weight"):
        fitted(shapes)


@pytest.mark.parametrize(
    ("settings", "classes", "complaint"),
    [
        ({"conv_centers.heads": 8}, {}, "conv_centers.heads is 8, not 1"),
        ({"conv_centers.root_weight": False}, {}, "root_weight is False"),
        ({"block_crosses.5.norm2.eps": 1e-6}, {}, "eps is 1e-06, not 1e-05"),
        ({"blocks.0.attn.num_heads": 7}, {}, "7 heads do not divide the dim 512"),
        ({"blocks.0.attn.num_heads": 8, "block_crosses.3.attn.num_heads": 4}, {}, "heads differs between layers"),
        ({"blocks.0.attn.num_heads": "8"}, {}, "'8' heads do not divide"),
        ({}, {"conv_centers": "GATConv"}, "conv_centers is a GATConv, not a TransformerConv"),
        ({}, {"relu": "LeakyReLU"}, "relu is a LeakyReLU, not a ReLU"),
    ],
)
def test_settings_of_another_model(settings: dict[str, Any], classes: dict[str, str], complaint: str) -> None:
    with pytest.raises(MisfitError, match="other than released: .*" + complaint):
        fitted(official_decoder(256, 1664), settings, **classes)


def test_neither_kind() -> None:
    with pytest.raises(MisfitError, match=r"its tensors are layer1\.weight$"):
        fitted({"layer1.weight": (2,)})
    with pytest.raises(MisfitError, match="given twice: module.centers|given twice: centers"):
        fitted({"centers": (2, 3), "module.centers": (2, 3)})


def test_rules_are_one_to_one() -> None:
    for architecture in (DECODER, ENCODER):
        for names in ([rule.theirs for rule in architecture.rules], [rule.ours for rule in architecture.rules]):
            assert len(set(names)) == len(names)
        assert all(("{i}" in rule.theirs) == ("{i}" in rule.ours) == bool(rule.layers) for rule in architecture.rules)


def test_some() -> None:
    assert some(["a"]) == "a" and some([str(k) for k in range(8)]) == "0, 1, 2, 3, 4, 5 and 2 more"
