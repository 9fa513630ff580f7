"""The authors' files, converted: our models then give the outputs of the released architecture."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmark.cli import main_guard
from benchmark.convert import main
from benchmark.errors import UserError
from benchmark.networks.unclip import UNET as PAPER_UNET
from benchmark.networks.unclip import build_unet
from benchmark.official_weights import convert, fit_unet, inspect, listing, load, subjects
from methods.brain_it.clustering import V2C
from methods.brain_it.encoder import BrainEncoder, TappedBackbone
from methods.brain_it.official import MisfitError
from methods.brain_it.tokenizer import VoxelLayout
from methods.brain_it.transformer import BIT
from methods.brain_it.unclip import NoiseSchedule

sys.path.insert(0, str(Path(__file__).parent))
import released_architecture as released

COUNTS, CLUSTERS, DIM, DEPTH, HEADS = (31, 26, 19), 6, 24, 2, 3
LOWLEVEL, SEMANTIC = (14, 8), (10, 20)  # query tokens, output width
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 2],
    "use_linear_projection": True,
    "class_embed_type": "projection",
    "cross_attention_dim": SEMANTIC[1],
    "projection_class_embeddings_input_dim": 12,
}


def labels() -> list[np.ndarray]:
    """Clusters of every subject's voxels: cluster 2 is empty for the first subject, cluster 5 for all."""
    rng = np.random.default_rng(3)
    return [rng.choice([0, 1, 3, 4] if subject == 0 else [0, 1, 2, 3, 4], n) for subject, n in enumerate(COUNTS)]


def v2c() -> V2C:
    return V2C(np.concatenate(labels()), CLUSTERS)


def decoder(branch: tuple[int, int] = SEMANTIC, seed: int = 1) -> released.Decoder:
    param = released.dec_param(sum(COUNTS), CLUSTERS, *branch, DIM, DEPTH, HEADS)
    return released.seeded(released.Decoder(param), seed)


def encoder(seed: int = 2) -> released.Encoder:
    dino = released.DinoVisionTransformer(grid=4, width=16, depth=5, num_heads=2, registers=4, patch=14)
    param = released.encoder_param(sum(COUNTS), inner=6, embed_dim=12, width=16, positions=17)
    return released.seeded(released.Encoder(param, dino, [1, 3, 4], r=3, alpha=0.7), seed)


@pytest.fixture
def decoder_file(tmp_path: Path) -> Path:
    released.save(decoder(), tmp_path / "decoder.pth")
    return tmp_path / "decoder.pth"


@pytest.fixture
def mapping_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "v2c.npy", v2c().table())
    return tmp_path / "v2c.npy"


def our_bit(tensors: dict[str, Tensor], about: dict[str, Any]) -> BIT:
    sizes = about["sizes"]
    bit = BIT(
        VoxelLayout.build(labels(), sizes["clusters"]),
        dim=sizes["dim"],
        depth=sizes["depth"],
        heads=about["settings"].get("heads", HEADS),
        mlp_ratio=sizes["hidden"] / sizes["dim"],
        n_queries=sizes["tokens"],
        out_dim=sizes["out_dim"],
    )
    bit.load_state_dict(tensors)
    return bit.eval()


def assert_same_function(ours: BIT, theirs: released.Decoder) -> None:
    """All voxels of a mixed batch, and sampled voxels with repeats, against theirs one example at a time."""
    table, starts = v2c().table(), np.cumsum((0, *COUNTS))
    generator = torch.Generator().manual_seed(5)
    subject = torch.tensor([0, 1, 2, 0, 1])
    betas = torch.randn(len(subject), max(COUNTS), generator=generator)
    with torch.no_grad():
        got = ours(betas, subject)
        for example, s in enumerate(subject.tolist()):
            rows = np.arange(starts[s], starts[s + 1])
            want = theirs(
                betas[example : example + 1, : COUNTS[s]], torch.from_numpy(rows), released.edges(table, [rows])
            )
            torch.testing.assert_close(got[example], want[0], rtol=1e-5, atol=1e-5)

        drawn = torch.stack([torch.randint(COUNTS[s], (12,), generator=generator) for s in subject.tolist()])
        assert any(len(set(row)) < len(row) for row in drawn.tolist())
        keep = torch.zeros(betas.shape, dtype=torch.bool).scatter_(1, drawn, True)
        rows = drawn + torch.tensor(starts)[subject, None]
        graph = released.edges(table, list(rows.numpy()))
        torch.testing.assert_close(
            ours(betas, subject, keep), theirs(betas.gather(1, drawn), rows, graph), rtol=1e-5, atol=1e-5
        )


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("branch", [LOWLEVEL, SEMANTIC], ids=["lowlevel", "semantic"])
@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_decoder_gives_the_released_outputs(tmp_path: Path, branch: tuple[int, int], zip_format: bool) -> None:
    theirs = decoder(branch)
    released.save(theirs, tmp_path / "d.pth", _use_new_zipfile_serialization=zip_format)
    (part,) = convert([tmp_path / "d.pth"], tmp_path / "d.safetensors")
    tensors, about = load(tmp_path / "d.safetensors")
    assert load_file(tmp_path / "d.safetensors").keys() == tensors.keys()
    assert about["sizes"] == {
        "voxels": sum(COUNTS),
        "clusters": CLUSTERS,
        "tokens": branch[0],
        "dim": DIM,
        "out_dim": branch[1],
        "hidden": 4 * DIM,
        "depth": DEPTH,
    }
    assert about["settings"] == {"heads": HEADS}
    assert about["parameters"] == sum(p.numel() for p in theirs.parameters())
    assert about["format"] == f"torch {'zip' if zip_format else 'legacy'}, a pickled Decoder"
    assert_same_function(our_bit(tensors, about), theirs)


def test_half_precision_and_several_gpus(tmp_path: Path) -> None:
    theirs = decoder().half()
    released.save(nn.DataParallel(theirs), tmp_path / "d.pth")
    convert([tmp_path / "d.pth"], tmp_path / "d.safetensors")
    tensors, about = load(tmp_path / "d.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert_same_function(our_bit(tensors, about), theirs.float())


def test_a_state_dict_is_as_good_as_a_module(tmp_path: Path) -> None:
    theirs = decoder()
    released.save(theirs.state_dict(), tmp_path / "d.pt")
    convert([tmp_path / "d.pt"], tmp_path / "d.safetensors")
    tensors, about = load(tmp_path / "d.safetensors")
    assert about["settings"] == {}  # nothing in it says how many heads there are
    assert_same_function(our_bit(tensors, about), theirs)


def test_encoder_gives_the_released_outputs(tmp_path: Path) -> None:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    theirs = encoder()
    released.save(theirs, tmp_path / "e.pth")
    convert([tmp_path / "e.pth"], tmp_path / "e.safetensors")
    tensors, about = load(tmp_path / "e.safetensors")
    sizes, settings = about["sizes"], about["settings"]
    assert about["left_out"] == {"not used by the released forward pass": 1}
    assert (settings["taps"], settings["registers"], settings["backbone_heads"]) == ([1, 3, 4], 4, 2)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    vit = timm.create_model(
        "vit_large_patch14_reg4_dinov2",
        img_size=4 * sizes["patch"],
        embed_dim=sizes["width"],
        depth=sizes["backbone_depth"],
        num_heads=settings["backbone_heads"],
        num_classes=0,
    )
    vit.load_state_dict(checkpoint_filter_fn(part("backbone."), vit))
    backbone = TappedBackbone(
        lambda images: vit.norm_pre(vit._pos_embed(vit.patch_embed(images))),
        list(vit.blocks),
        [sizes["width"]] * sizes["backbone_depth"],
        settings["taps"],
        rank=sizes["rank"],
        alpha=settings["adapter_scale"] * sizes["rank"],
        cls_token=True,
        n_registers=settings["registers"],
    )
    adapters = part("adapters.")
    assert len(adapters) == 2 * sizes["backbone_depth"]
    kept = len(backbone.adapters)  # blocks after the last tap are left out
    backbone.adapters.load_state_dict({k: v for k, v in adapters.items() if int(k.split(".")[0]) < kept})
    ours = BrainEncoder(
        COUNTS, backbone.tap_channels, sizes["positions"], embed_dim=sizes["embed_dim"], inner=sizes["inner"]
    )
    ours.load_state_dict({k: v for k, v in tensors.items() if not k.startswith(("backbone.", "adapters."))})
    ours.eval()

    generator = torch.Generator().manual_seed(6)
    images = torch.randn(3, 3, 56, 56, generator=generator)
    voxels = torch.randint(sum(COUNTS), (3, 40), generator=generator)
    with torch.no_grad():
        features = backbone.eval()(images)
        torch.testing.assert_close(ours(features, voxels), theirs(images, voxels), rtol=1e-5, atol=1e-5)
        everybody = torch.arange(COUNTS[0], COUNTS[0] + COUNTS[1]).expand(3, -1)
        torch.testing.assert_close(ours.predict(features, 1), theirs(images, everybody), rtol=1e-5, atol=1e-5)


def sgm_unet(seed: int = 4) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A small UNet's weights, in diffusers' names and in those of Stability's code."""
    from diffusers import UNet2DConditionModel

    unet = released.seeded(UNet2DConditionModel(**UNET), seed).state_dict()
    sgm = {released.sgm_name(name, UNET): tensor for name, tensor in unet.items()}
    assert len(sgm) == len(unet)
    return unet, sgm


@pytest.fixture
def joint(tmp_path: Path) -> Callable[..., Path]:
    def write(change: Callable[[dict[str, Any]], None] = lambda checkpoint: None) -> Path:
        checkpoint = released.lightning_checkpoint(decoder(), sgm_unet()[1], NoiseSchedule().sigmas.clone())
        change(checkpoint["state_dict"])
        released.save(checkpoint, tmp_path / "combined.ckpt")
        return tmp_path / "combined.ckpt"

    return write


def test_joint_model(joint: Callable[..., Path], tmp_path: Path) -> None:
    convert([joint()], tmp_path / "j.safetensors", unet=UNET)
    tensors, about = load(tmp_path / "j.safetensors", "joint")
    assert sum(about["left_out"].values()) == 3
    unet = {name.removeprefix("unet."): t for name, t in tensors.items() if name.startswith("unet.")}
    expected = sgm_unet()[0]
    assert unet.keys() == expected.keys()
    assert all(torch.equal(unet[name], expected[name]) for name in expected)
    bit = {name.removeprefix("bit."): t for name, t in tensors.items() if name.startswith("bit.")}
    assert len(bit) + len(unet) == len(tensors)
    assert_same_function(our_bit(bit, about), decoder())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s["diffusion_engine"].pop("model.diffusion_model.out.2.bias"), r"missing .*conv_out\.bias"),
        (lambda s: s["diffusion_engine"].update({"model.diffusion_model.x": torch.ones(2)}), r"unexpected: .*x"),
        (
            lambda s: s["diffusion_engine"].update({"model.diffusion_model.out.2.bias": torch.ones(5)}),
            r"wrong shape: out\.2\.bias is \(5,\), not \(4,\)",
        ),
        (lambda s: s["diffusion_engine"].update(extra=torch.ones(2)), r"unexpected: diffusion_engine\.extra \(2,\)"),
        (lambda s: s["gnn_model"].pop("centers"), "missing: centers"),
        (
            lambda s: s["diffusion_engine"].update({"denoiser.sigmas": torch.linspace(0, 10, 1000)}),
            "other noise levels",
        ),
        (lambda s: s.pop("diffusion_engine"), "denoiser"),
        (lambda s: s["diffusion_engine"].update({"model.diffusion_model.label_emb.0.0.weight": None}), "label_emb"),
    ],
)
def test_joint_misfits_are_named(
    joint: Callable[..., Path], tmp_path: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        convert([joint(change)], tmp_path / "j.safetensors", unet=UNET)
    assert not (tmp_path / "j.safetensors").exists()


def test_the_denoiser_of_the_paper_in_full() -> None:
    """Its 1,680 tensors by name and shape, on the meta device."""
    shapes = {name: tuple(value.shape) for name, value in build_unet(PAPER_UNET).state_dict().items()}
    sgm = {released.sgm_name(name, PAPER_UNET): shape for name, shape in shapes.items()}
    found = fit_unet(sgm, PAPER_UNET)
    assert len(found) == 1680 and sum(math.prod(shape) for shape in shapes.values()) == 2_501_272_324
    assert {ours: sgm[theirs] for ours, theirs in found.items()} == shapes
    for name in ("input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", "label_emb.0.0.weight"):
        assert sgm[name][1] == {"i": 1664, "l": 1024}[name[0]]
    with pytest.raises(MisfitError, match=r"wrong shape: middle_block\.0\.in_layers\.0\.weight is \(7,\)"):
        fit_unet(sgm | {"middle_block.0.in_layers.0.weight": (7,)}, PAPER_UNET)


def test_several_files_become_parts_of_one(decoder_file: Path, mapping_file: Path, tmp_path: Path) -> None:
    released.save(encoder(), tmp_path / "encoder.pth")
    out = tmp_path / "all.safetensors"
    parts = convert([tmp_path / "encoder.pth", decoder_file, mapping_file], out)
    assert [part.role for part in parts] == ["encoder", "bit", "clusters"]
    tensors, about = load(out, "bit")
    assert_same_function(our_bit(tensors, about), decoder())
    assert torch.equal(load(out, "clusters")[0]["labels"], torch.from_numpy(v2c().labels))
    with pytest.raises(UserError, match="holds bit, clusters, encoder; say which part"):
        load(out)
    with pytest.raises(UserError, match="not semantic"):
        load(out, "semantic")


def test_files_that_do_not_belong_together(decoder_file: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", V2C(v2c().labels[1:], CLUSTERS).table())
    with pytest.raises(UserError, match=r"differ in voxels \(decoder.pth 76, other.npy 75\)"):
        convert([decoder_file, tmp_path / "other.npy"], tmp_path / "o.safetensors")
    np.save(tmp_path / "other.npy", V2C(v2c().labels, CLUSTERS + 1).table())
    with pytest.raises(UserError, match="differ in clusters"):
        convert([decoder_file, tmp_path / "other.npy"], tmp_path / "o.safetensors")
    with pytest.raises(UserError, match="two files of the role 'bit'"):
        convert([decoder_file, decoder_file], tmp_path / "o.safetensors")


# --- Tables -----------------------------------------------------------------------------------------------------------


def ragged() -> np.ndarray:
    rows = np.empty(CLUSTERS, dtype=object)
    rows[:] = [np.flatnonzero(v2c().labels == cluster) for cluster in range(CLUSTERS)]
    return rows


@pytest.mark.parametrize(
    "table",
    [
        lambda: v2c().table(),
        lambda: v2c().table().astype(np.int32)[:, ::-1],
        lambda: np.asfortranarray(v2c().table()),
        ragged,
        lambda: np.array({"mapping": v2c().table(), "note": "x"}, dtype=object),
        lambda: np.array({"v2c": [list(map(int, row)) for row in ragged()]}, dtype=object),
        lambda: np.array({"v2c": list(ragged())}, dtype=object),
    ],
    ids=["int64", "int32", "fortran", "ragged", "dict", "dict of lists", "dict of arrays"],
)
def test_tables_of_every_form(table: Callable[[], np.ndarray], tmp_path: Path) -> None:
    np.save(tmp_path / "v2c.npy", table())
    (part,) = convert([tmp_path / "v2c.npy"], tmp_path / "v2c.safetensors")
    mapping = V2C.load(tmp_path / "v2c.safetensors")
    assert np.array_equal(mapping.labels, v2c().labels) and mapping.n_clusters == CLUSTERS
    assert np.array_equal(mapping.table(), v2c().table())
    assert part.about["sizes"] == {"voxels": 76, "clusters": 6, "largest": v2c().table().shape[1], "smallest": 0}
    with safe_open(tmp_path / "v2c.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["official"])["parts"]["clusters"]["file"] == "v2c.npy"


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ([[0, 1, -1], [2, 1, 3]], r"voxel 1 is in it 2 times \(1 voxels"),
        ([[0, 1, -1], [2, 4, -1]], r"voxel 3 is in no cluster \(1 voxels"),
        ([[0, 1], [2, 400]], "names voxel 400; expected 0..3"),
        ([[0, 1], [2, -7]], "names voxel -7"),
        ([[0.0, 1.0]], "float64 of shape"),
        ([0, 1, 2], r"int64 of shape \(3,\)"),
        ([[-1, -1]], "no voxel"),
        (np.array({"other": 1}, dtype=object), "keys other; expected one of"),
        (np.array([[1, 2], "ab"], dtype=object), "no list of voxel numbers"),
        (np.array("text"), "of shape"),
    ],
)
def test_tables_that_miss_or_repeat_voxels(table: Any, complaint: str, tmp_path: Path) -> None:
    np.save(tmp_path / "v2c.npy", np.asarray(table))
    with pytest.raises(UserError, match=complaint):
        convert([tmp_path / "v2c.npy"], tmp_path / "v2c.safetensors")


# --- Misfits ----------------------------------------------------------------------------------------------------------


def _without(module: Any, *names: str) -> Any:
    for name in names:
        *path, last = name.split(".")
        owner = module.get_submodule(".".join(path))
        owner.register_parameter(last, None)
    return module


def _set(module: Any, name: str, value: Any) -> Any:
    *path, last = name.split(".")
    setattr(module.get_submodule(".".join(path)), last, value)
    return module


@pytest.mark.parametrize(
    ("make", "complaints"),
    [
        (lambda: _without(decoder(), "conv_centers.lin_skip.bias", "proj.bias"), ["missing: conv_centers.lin_skip.bias, proj.bias"]),
        (lambda: _set(decoder(), "extra", nn.Linear(2, 3)), ["unexpected: extra.bias (3,), extra.weight (3, 2)"]),
        (lambda: _set(decoder(), "blocks.1.mlp.fc1", nn.Linear(DIM, 50)), ["blocks.1.mlp.fc1.weight is (50, 24), not (96, 24)", "fc1.bias is (50,), not (96,)"]),
        (lambda: _set(decoder(), "conv_centers", released.TransformerConv(DIM, DIM // 2, heads=2)), ["conv_centers.heads is 2, not 1"]),
        (lambda: _set(decoder(), "norm_centers.eps", 1e-6), ["norm_centers.eps is 1e-06, not 1e-05"]),
        (lambda: _set(decoder(), "blocks.0.mlp.act", nn.ReLU()), ["blocks.0.mlp.act is a ReLU, not a GELU"]),
        (lambda: _set(decoder(), "blocks.0.mlp.act", nn.GELU("tanh")), ["approximate is 'tanh', not 'none'"]),
        (lambda: _set(decoder(), "blocks.0.attn.num_heads", 4), ["heads differs between layers"]),
        (lambda: _set(encoder(), "include_reg_tokens", True), ["include_reg_tokens is True, not False"]),
        (lambda: _set(encoder(), "select_layers", [1, 3]), ["the taps (1, 3), with 3 of 5 blocks tapped"]),
        (lambda: _set(encoder(), "map_att.0.softmax", False), ["map_att.0.softmax is False, not True"]),
        (lambda: _set(encoder(), "lora_scale", float("nan")), ["adapter_scale is nan, no number"]),
        (lambda: _without(encoder(), "embed_model.register_tokens"), ["missing: embed_model.register_tokens"]),
        (lambda: nn.Linear(3, 2), ["its tensors are weight, bias"]),
    ],
)  # fmt: skip
def test_misfits_are_named(make: Callable[[], Any], complaints: list[str], tmp_path: Path) -> None:
    released.save(make(), tmp_path / "m.pth")
    with pytest.raises(UserError) as caught:
        convert([tmp_path / "m.pth"], tmp_path / "m.safetensors")
    for complaint in (*complaints, "m.pth", "python -m benchmark.convert --list"):
        assert complaint in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.pth"]


def test_weights_must_be_finite_floats(tmp_path: Path) -> None:
    broken = decoder()
    with torch.no_grad():
        broken.pred_tokens[2, 3] = torch.nan
    released.save(broken, tmp_path / "d.pth")
    with pytest.raises(UserError, match="not finite, for query_tokens"):
        convert([tmp_path / "d.pth"], tmp_path / "d.safetensors")
    state = decoder().state_dict() | {"centers": torch.ones(CLUSTERS, DIM, dtype=torch.int64)}
    released.save(state, tmp_path / "d.pth")
    with pytest.raises(UserError, match=r"no floating-point numbers: centers \(int64\)"):
        convert([tmp_path / "d.pth"], tmp_path / "d.safetensors")


def test_views_and_tied_weights(tmp_path: Path) -> None:
    """Tensors that lie strangely in their storage, or share one, arrive as they read."""
    state = decoder().state_dict()
    block = torch.randn(2, DIM, DIM)
    state["conv_centers.lin_key.weight"] = block[0].T
    state["conv_centers.lin_query.weight"] = block[1]
    state["conv_centers.lin_value.weight"] = block[1]
    released.save(state, tmp_path / "d.pt")
    convert([tmp_path / "d.pt"], tmp_path / "d.safetensors")
    tensors, _ = load(tmp_path / "d.safetensors")
    assert torch.equal(tensors["tokenizer.lin_key.weight"], block[0].T)
    assert torch.equal(tensors["tokenizer.lin_query.weight"], block[1])
    assert torch.equal(tensors["tokenizer.lin_value.weight"], block[1])


# --- Command line -----------------------------------------------------------------------------------------------------


def test_command_line(decoder_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "d.safetensors"
    assert main(["--official", str(decoder_file), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "BIT (bit), torch zip, a pickled Decoder, sha256" in said
    assert "voxels 76" in said and "clusters 6" in said and "tokens 10" in said and "settings: heads 3" in said
    assert f"{sum(p.numel() for p in decoder().parameters()):,} parameters" in said
    assert [path.name for path in out.parent.iterdir()] == ["d.safetensors"]
    first = out.read_bytes()
    assert main(["--official", str(decoder_file), "--out", str(out)]) == 0
    assert out.read_bytes() == first
    with safe_open(out, framework="pt") as file:
        about = json.loads(file.metadata()["official"])
    part = about["parts"]["bit"]
    assert about["mapping_version"] == 1 and part["kind"] == "BIT" and part["file"] == "decoder.pth"
    assert len(part["sha256"]) == 64


def test_list_shows_every_tensor(decoder_file: Path, mapping_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--official", str(decoder_file), str(mapping_file)]) == 0
    said = capsys.readouterr().out
    for name, tensor in decoder().state_dict().items():
        assert any(
            line.split()[:2] == [name, "float32"] and line.endswith(" x ".join(map(str, tensor.shape)))
            for line in said.splitlines()
        )
    assert "fits the released BIT" in said and "voxel-to-cluster table" in said


def test_list_shows_what_does_not_fit(tmp_path: Path) -> None:
    hostile = {"a\x1b[2J": torch.ones(2, 3), "b": torch.tensor(1.0)}
    released.save(hostile, tmp_path / "x.pt")
    lines = list(listing(tmp_path / "x.pt"))
    assert lines[0].split(None, 1) == ["a?[2J", "float32   2 x 3"]
    assert lines[1].split() == ["b", "float32", "scalar"]
    assert "does not fit" in lines[-1] and "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--official {file}", "say either --out"),
        ("--official {file} --out x.safetensors --list", "say either --out"),
        ("--official {file} --out {dir}/x.pt", "ends in .safetensors"),
        ("--official {dir}/none.pth --out {dir}/x.safetensors", "cannot be read (No such file"),
        ("--official {dir} --out {dir}/x.safetensors", "cannot be read (Is a directory"),
        ("--official {dir}/empty.pth --out {dir}/x.safetensors", "it is empty"),
        ("--official {file} --out {file}/x.safetensors", "cannot be written (File exists"),
    ],
)
def test_calls_that_are_wrong(
    decoder_file: Path, arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (decoder_file.parent / "empty.pth").touch()
    words = arguments.format(file=decoder_file, dir=decoder_file.parent).split()
    assert main_guard(lambda: main(words)) == 2
    said = capsys.readouterr()
    assert complaint in said.err and said.out == ""
    assert len(said.err.splitlines()) <= 2 and "Traceback" not in said.err


def test_out_may_not_be_an_input(decoder_file: Path) -> None:
    name = decoder_file.rename(decoder_file.with_suffix(".safetensors"))
    with pytest.raises(UserError, match="is one of the official files"):
        convert([name], name)


def test_help_is_quick() -> None:
    def seconds() -> float:
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "benchmark.convert", "--help"], check=True, capture_output=True)
        return time.monotonic() - started

    assert min(seconds() for _ in range(3)) < 0.5


def test_an_interrupted_write_leaves_the_old_file(
    decoder_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d.safetensors"
    convert([decoder_file], out)
    before = out.read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("benchmark.official_weights.save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        convert([decoder_file], out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors", "decoder.pth"]


def test_whose_voxels() -> None:
    assert subjects(315_997) == "8 (all of NSD)"
    assert subjects(39_548) == "1 (by its voxels, NSD's subject 1, 2, 3, 4, 5 or 7)"
    assert subjects(39_198) == "1 (by its voxels, NSD's subject 6)"
    assert subjects(315_997 - 39_511) == "7 (by their voxels, all of NSD but subject 8)"
    assert "not told" in subjects(5)


def test_the_paper_s_decoder_in_full(tmp_path: Path) -> None:
    """The true shapes but for the voxel table, which has a subject's voxels: the role is recognised."""
    table = V2C(np.arange(39_548) % 128, 128).table()
    np.save(tmp_path / "v2c.npy", table)
    with torch.device("meta"):
        theirs = released.Decoder(released.dec_param(39_548, 128, 7190, 512, 512, 5, 8))
    theirs.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    released.save(theirs, tmp_path / "d.pth")
    parts = [inspect(tmp_path / name) for name in ("d.pth", "v2c.npy")]
    assert [part.role for part in parts] == ["lowlevel", "clusters"]
    sizes = parts[0].about["sizes"]
    assert (sizes["tokens"], sizes["depth"], sizes["hidden"]) == (7190, 5, 2048)
    assert parts[0].about["settings"] == {"heads": 8}
    assert parts[1].about["sizes"]["largest"] == 309
    assert "1 (by its voxels" in parts[0].report()
