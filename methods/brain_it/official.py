"""The authors' released checkpoints: what their tensors are called here, and what must hold for them to fit.

Everything is decided from names, shapes and plain settings; no tensor is touched, no file is opened.

Sources of the names: the decoder's are in ``models/decoder_models.py`` of the official code (github.com,
WeizmannVision/brainit-fmri), the joint model's in its ``models/combined_diffusion_engine.py``. The encoder's class is
used there but not published beside it; its names are those of a public port that reads the authors' file
(ab4736/ube-2afc, ``models/encoder_models.py``), and of DINOv2's hub models for the backbone within it.

=============================  ==========================================================================
official encoder               here
=============================  ==========================================================================
voxel_embed, feat_embed        voxel_embedding, readout                                   (`BrainEncoder`)
pos_embed                      position
norm_in.i, in_project.i        readers.i.norm, readers.i.reduce
map_att.i.project, .project_x  readers.i.query, readers.i.key
norm.i, mlp.i.fc1, mlp.i.fc2   readers.i.pooled_norm, readers.i.mlp.0, readers.i.mlp.2
lora_B.i, lora_A.i             adapters.i.down, adapters.i.up                          (`TappedBackbone`)
embed_model.*                  backbone.*: DINOv2 in its own hub's names, which timm reads
layer_embed                    left out: the released forward pass does not use it
=============================  ==========================================================================

The decoder's table is in `methods.brain_it.transformer.BIT`. In the joint model the decoder is ``gnn_model.*`` and the
denoiser ``diffusion_engine.model.diffusion_model.*``, in the names of Stability AI's code (sgm); here ``bit.*`` and
``unet.*``, the latter in the names of diffusers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
Sizes = Mapping[str, int]

MAPPING_VERSION = 1
"""Of the tables in this module; stands in every converted file."""

_ROLES = {(7190, 512): "lowlevel", (256, 1664): "semantic"}  # (query tokens, output width) of the paper


@dataclass(frozen=True)
class Rule:
    """One kind of tensor.

    Attributes:
        theirs: official name; ``{i}`` counts layers.
        ours: name here.
        shape: its sizes by name, separated by spaces; "3*dim" and "depth+1" are meant as they read.
        layers: the size that ``{i}`` counts to; "" without ``{i}``.
    """

    theirs: str
    ours: str
    shape: str
    layers: str = ""


@dataclass(frozen=True)
class Architecture:
    """One kind of official file.

    Attributes:
        kind: what it is called in messages.
        signs: names that only this kind has.
        counted: sizes that are numbers of layers: pattern of the names, the layer's number in parentheses.
        rules: all tensors; the first rules that mention a size define it.
        left_out: pattern of names that are not converted: why.
        classes: pattern of module names: the class that must be there, where the file tells.
        settings: pattern of settings: what they must be, where the file tells.
        noted: what else is worth knowing: pattern of the settings that say it, and must agree.
    """

    kind: str
    signs: tuple[str, ...]
    counted: Mapping[str, str]
    rules: tuple[Rule, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    noted: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """How an official file becomes ours.

    Attributes:
        kind: "BIT", "encoder" or "joint model".
        role: the part it has in the pipeline: "lowlevel", "semantic", "encoder", "joint", or "bit" for a decoder of
            other sizes than the paper's.
        names: our name of every converted tensor: the official name.
        left_out: why tensors are not converted: their names.
        sizes: voxels, clusters, tokens, dim, depth ...
        settings: heads, taps ... where the file tells; also whatever sizes cannot tell.
    """

    kind: str
    role: str
    names: Mapping[str, str]
    left_out: Mapping[str, Sequence[str]]
    sizes: Sizes
    settings: Mapping[str, Any]


class MisfitError(ValueError):
    """A file does not fit the released architecture; `problems` names each thing that is wrong."""

    def __init__(self, kind: str, problems: Sequence[str]) -> None:
        super().__init__(f"does not fit the released {kind}: " + "; ".join(problems))
        self.kind, self.problems = kind, list(problems)


def _linear(theirs: str, ours: str, out: str, inner: str, layers: str = "", bias: bool = True) -> tuple[Rule, ...]:
    weight = Rule(f"{theirs}.weight", f"{ours}.weight", f"{out} {inner}", layers)
    return (weight, Rule(f"{theirs}.bias", f"{ours}.bias", out, layers)) if bias else (weight,)


def _norm(theirs: str, ours: str, dim: str, layers: str = "") -> tuple[Rule, ...]:
    return tuple(Rule(f"{theirs}.{part}", f"{ours}.{part}", dim, layers) for part in ("weight", "bias"))


def _block(name: str, projection: str, width: str, layers: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{name}.norm1", f"{name}.norm1", "dim", layers),
        *_linear(f"{name}.attn.{projection}", f"{name}.attn.{projection}", width, "dim", layers, bias=False),
        *_linear(f"{name}.attn.proj", f"{name}.attn.proj", "dim", "dim", layers),
        *_norm(f"{name}.norm2", f"{name}.norm2", "dim", layers),
        *_linear(f"{name}.mlp.fc1", f"{name}.mlp.fc1", "hidden", "dim", layers),
        *_linear(f"{name}.mlp.fc2", f"{name}.mlp.fc2", "dim", "hidden", layers),
    )


DECODER = Architecture(
    kind="BIT",
    signs=("pred_tokens", "centers", "conv_centers.lin_key.weight"),
    counted={"depth": r"blocks\.([0-9]{1,3})\..*"},
    rules=(
        Rule("voxel_embed", "tokenizer.voxel_embeddings", "voxels dim"),
        Rule("centers", "tokenizer.cluster_embeddings", "clusters dim"),
        Rule("pred_tokens", "query_tokens", "tokens dim"),
        *(
            rule
            for part in ("key", "query", "value", "skip")
            for rule in _linear(f"conv_centers.lin_{part}", f"tokenizer.lin_{part}", "dim", "dim")
        ),
        *_norm("norm_centers", "tokenizer.norm", "dim"),
        *_linear("proj", "proj", "out_dim", "dim"),
        *_block("blocks.{i}", "qkv", "3*dim", "depth"),
        *_block("block_crosses.{i}", "kv", "2*dim", "depth+1"),
    ),
    classes={
        r"conv_centers": "TransformerConv",
        r"relu": "ReLU",
        r"norm_centers|.*\.norm[12]": "LayerNorm",
        r".*\.mlp\.act": "GELU",
    },
    settings={
        r"conv_centers\.heads": 1,
        r"conv_centers\.(concat|root_weight)": True,
        r"conv_centers\.beta": False,
        r"conv_centers\.edge_dim": None,
        r"conv_centers\.aggr": "add",
        r"conv_centers\.flow": "source_to_target",
        r"(norm_centers|.*\.norm[12])\.eps": 1e-5,
        r".*\.mlp\.act\.approximate": "none",
    },
    noted={"heads": r"(blocks|block_crosses)\.\d+\.attn\.num_heads"},
)

_BACKBONE = "embed_model.blocks.{i}"
ENCODER = Architecture(
    kind="encoder",
    signs=("feat_embed", "in_project.0.weight", "lora_A.0.weight"),
    counted={"taps": r"in_project\.([0-9]{1,3})\..*", "backbone_depth": r"embed_model\.blocks\.([0-9]{1,3})\..*"},
    rules=(
        Rule("voxel_embed", "voxel_embedding", "voxels embed_dim"),
        Rule("pos_embed", "position", "positions embed_dim"),
        *_norm("norm_in.{i}", "readers.{i}.norm", "width", "taps"),
        *_linear("in_project.{i}", "readers.{i}.reduce", "inner", "width", "taps"),
        Rule("feat_embed", "readout", "embed_dim taps*inner"),
        *_linear("map_att.{i}.project", "readers.{i}.query", "embed_dim", "embed_dim", "taps"),
        *_linear("map_att.{i}.project_x", "readers.{i}.key", "embed_dim", "inner", "taps"),
        *_norm("norm.{i}", "readers.{i}.pooled_norm", "inner", "taps"),
        *_linear("mlp.{i}.fc1", "readers.{i}.mlp.0", "hidden", "inner", "taps"),
        *_linear("mlp.{i}.fc2", "readers.{i}.mlp.2", "inner", "hidden", "taps"),
        Rule("lora_B.{i}.weight", "adapters.{i}.down", "rank width", "backbone_depth"),
        Rule("lora_A.{i}.weight", "adapters.{i}.up", "width rank", "backbone_depth"),
        Rule("embed_model.cls_token", "backbone.cls_token", "1 1 width"),
        Rule("embed_model.pos_embed", "backbone.pos_embed", "1 backbone_positions width"),
        Rule("embed_model.register_tokens", "backbone.register_tokens", "1 registers width"),
        Rule("embed_model.mask_token", "backbone.mask_token", "1 width"),
        Rule("embed_model.patch_embed.proj.weight", "backbone.patch_embed.proj.weight", "width 3 patch patch"),
        Rule("embed_model.patch_embed.proj.bias", "backbone.patch_embed.proj.bias", "width"),
        *(
            rule
            for theirs, ours in [(_BACKBONE, "backbone.blocks.{i}")]
            for rule in (
                *_norm(f"{theirs}.norm1", f"{ours}.norm1", "width", "backbone_depth"),
                *_linear(f"{theirs}.attn.qkv", f"{ours}.attn.qkv", "3*width", "width", "backbone_depth"),
                *_linear(f"{theirs}.attn.proj", f"{ours}.attn.proj", "width", "width", "backbone_depth"),
                Rule(f"{theirs}.ls1.gamma", f"{ours}.ls1.gamma", "width", "backbone_depth"),
                *_norm(f"{theirs}.norm2", f"{ours}.norm2", "width", "backbone_depth"),
                *_linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1", "backbone_hidden", "width", "backbone_depth"),
                *_linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2", "width", "backbone_hidden", "backbone_depth"),
                Rule(f"{theirs}.ls2.gamma", f"{ours}.ls2.gamma", "width", "backbone_depth"),
            )
        ),
        *_norm("embed_model.norm", "backbone.norm", "width"),
    ),
    left_out={r"layer_embed": "not used by the released forward pass"},
    classes={
        r"map_att\.\d+": "MapAttention_dynamic_pos",
        r"mlp\.\d+\.act|embed_model\.blocks\.\d+\.mlp\.act": "GELU",
        r"norm(_in)?\.\d+|embed_model\.(blocks\.\d+\.norm[12]|norm)": "LayerNorm",
    },
    settings={
        r"include_reg_tokens": False,
        r"map_att\.\d+\.softmax": True,
        r"norm(_in)?\.\d+\.eps": 1e-5,
        r"embed_model\.(blocks\.\d+\.norm[12]|norm)\.eps": 1e-6,
        r"(.*\.)?mlp\.(\d+\.)?act\.approximate": "none",
    },
    noted={
        "taps": r"select_layers",
        "adapter_scale": r"lora_scale",
        "registers": r"num_reg_tokens",
        "dropout": r"param\.drop_out",
        "backbone_heads": r"embed_model\.blocks\.\d+\.attn\.num_heads",
    },
)

BIT_IN_JOINT, UNET_IN_JOINT = "gnn_model.", "diffusion_engine.model.diffusion_model."
SIGMAS_IN_JOINT = "diffusion_engine.denoiser.sigmas"
JOINT_LEFT_OUT = {
    r"diffusion_engine\.first_stage_model\..*": "SDXL's autoencoder, frozen in training: it comes with SDXL-unCLIP",
    r"diffusion_engine\.conditioner\..*": "OpenCLIP ViT-bigG/14, frozen in training",
    r"diffusion_engine\.denoiser\.sigmas": "the noise levels, which are computed here",
}

SPELLINGS = (
    (r"^module\.", ""),  # trained on several GPUs
    (r"^(gnn_model|diffusion_engine)\.module\.", r"\1."),
    (r"(^|\.)_orig_mod\.", r"\1"),  # compiled
    (r"^(embed_model\.blocks)\.\d+\.(\d+\.)", r"\1.\2"),  # a DINOv2 whose blocks are in chunks
)
"""Other spellings of the same names: pattern and replacement."""


def spelled(name: str) -> str:
    """Return an official name in the spelling of the tables."""
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def fit(
    shapes: Mapping[str, Shape],
    settings: Mapping[str, Any],
    classes: Mapping[str, str],
    unet_names: Callable[[Mapping[str, Shape]], Mapping[str, str]],
) -> Fit:
    """Find out what an official file is, and what each of its tensors is called here.

    Args:
        shapes: shape of each tensor by its official name.
        settings: plain attributes of its modules by dotted name; empty for a state dict.
        classes: class of its modules by dotted name; empty for a state dict.
        unet_names: shapes of the denoiser's tensors by sgm's name (`fit` knows no diffusion models) -> our name: sgm's
            name; raises MisfitError.

    Raises:
        MisfitError: it is none of the kinds, or a tensor is missing, unexpected or of another shape, or a setting or
            class differs from the released one. All of them are named.
    """
    names = {spelled(name): name for name in shapes}
    if len(names) < len(shapes):
        twice = sorted(set(shapes) - set(names.values()))
        raise MisfitError("files", [f"given twice: {some(twice)}"])
    shapes = {ours: shapes[theirs] for ours, theirs in names.items()}
    settings = {spelled(name): value for name, value in settings.items()}
    classes = {spelled(name): value for name, value in classes.items()}
    if any(name.startswith((BIT_IN_JOINT, "diffusion_engine.")) for name in shapes):
        found = _fit_joint(shapes, settings, classes, unet_names)
    else:
        for architecture in (DECODER, ENCODER):
            if any(sign in shapes for sign in architecture.signs):
                found = _fit(architecture, shapes, settings, classes)
                break
        else:
            raise MisfitError("files (encoder, decoders, joint model)", [f"its tensors are {some(list(shapes))}"])
    return Fit(
        found.kind,
        found.role,
        {ours: names[theirs] for ours, theirs in found.names.items()},
        found.left_out,
        found.sizes,
        found.settings,
    )


def _fit(
    architecture: Architecture, shapes: Mapping[str, Shape], settings: Mapping[str, Any], classes: Mapping[str, str]
) -> Fit:
    left_out, kept = _leave_out(architecture.left_out, shapes)
    sizes = {size: _count(pattern, kept) for size, pattern in architecture.counted.items()}
    names: dict[str, str] = {}
    missing, wrong = [], []
    for rule in architecture.rules:
        for i in range(_value(rule.layers, sizes) or 0) if rule.layers else [None]:
            theirs, ours = (name.replace("{i}", str(i)) for name in (rule.theirs, rule.ours))
            if theirs not in kept:
                missing.append(theirs)
            elif (expected := _match(rule.shape, kept[theirs], sizes)) is not None:
                wrong.append(f"{theirs} is {kept[theirs]}, not {expected}")
            names[ours] = theirs
    unexpected = [f"{name} {kept[name]}" for name in kept.keys() - set(names.values())]
    noted, different = _settings(architecture, settings, classes)
    different += _inconsistent(noted, sizes)
    problems = [
        f"{what}: {some(list(which))}"
        for what, which in (
            ("missing", missing),
            ("unexpected", sorted(unexpected)),
            ("wrong shape", wrong),
            ("other than released", different),
        )
        if which
    ]
    if problems:
        raise MisfitError(architecture.kind, problems)
    role = "encoder"
    if architecture is DECODER:
        role = _ROLES.get((sizes["tokens"], sizes["out_dim"]), "bit")
    return Fit(architecture.kind, role, names, left_out, sizes, noted)


def _fit_joint(
    shapes: Mapping[str, Shape],
    settings: Mapping[str, Any],
    classes: Mapping[str, str],
    unet_names: Callable[[Mapping[str, Shape]], Mapping[str, str]],
) -> Fit:
    left_out, kept = _leave_out(JOINT_LEFT_OUT, shapes)
    bit = _fit(DECODER, *(_within(BIT_IN_JOINT, part) for part in (kept, settings, classes)))
    other = [f"{name} {kept[name]}" for name in kept if not name.startswith((BIT_IN_JOINT, UNET_IN_JOINT))]
    if other:
        raise MisfitError("joint model", [f"unexpected: {some(other)}"])
    names = {f"bit.{ours}": BIT_IN_JOINT + theirs for ours, theirs in bit.names.items()}
    for ours, theirs in unet_names(_within(UNET_IN_JOINT, kept)).items():
        names[f"unet.{ours}"] = UNET_IN_JOINT + theirs
    return Fit("joint model", "joint", names, left_out, bit.sizes, bit.settings)


def _leave_out(
    patterns: Mapping[str, str], shapes: Mapping[str, Shape]
) -> tuple[dict[str, list[str]], dict[str, Shape]]:
    left_out: dict[str, list[str]] = {}
    kept = {}
    for name, shape in shapes.items():
        why = next((why for pattern, why in patterns.items() if re.fullmatch(pattern, name)), None)
        if why is None:
            kept[name] = shape
        else:
            left_out.setdefault(why, []).append(name)
    return left_out, kept


def _within(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _count(pattern: str, names: Iterable[str]) -> int:
    """Return how many layers the names tell of: one more than the largest number."""
    numbers = [int(match.group(1)) for name in names if (match := re.fullmatch(pattern, name))]
    return max(numbers, default=-1) + 1


def _value(expression: str, sizes: Sizes) -> int | None:
    """Return the value of "dim", "3*dim", "depth+1"; None while a size is not known."""
    sums = []
    for term in expression.split("+"):
        factors = [int(word) if word.isdigit() else sizes.get(word) for word in term.split("*")]
        if None in factors:
            return None
        sums.append(math.prod(factor for factor in factors if factor is not None))
    return sum(sums)


def _match(expressions: str, shape: Shape, sizes: dict[str, int]) -> str | None:
    """Compare a shape with what is expected, learning the sizes that stand alone; None where they agree."""
    words = expressions.split()
    learnt = dict(sizes)
    if len(words) == len(shape):
        for word, size in zip(words, shape, strict=True):
            learnt.setdefault(word, size) if word.isidentifier() else None
        if all(_value(word, learnt) == size for word, size in zip(words, shape, strict=True)):
            sizes |= learnt
            return None
    expected = [str(_value(word, sizes) or word) for word in words]
    return f"({', '.join(expected)}{',' * (len(expected) == 1)})"


def _settings(
    architecture: Architecture, settings: Mapping[str, Any], classes: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return what is worth noting, and what differs from the released code."""
    different = []
    for pattern, expected in architecture.settings.items():
        for name, value in settings.items():
            if re.fullmatch(pattern, name) and value != expected:
                different.append(f"{name} is {value!r:.40}, not {expected!r}")
    for pattern, cls in architecture.classes.items():
        for name, value in classes.items():
            if re.fullmatch(pattern, name) and value != cls:
                different.append(f"{name} is a {value:.40}, not a {cls}")
    noted = {}
    for what, pattern in architecture.noted.items():
        values = [value for name, value in settings.items() if re.fullmatch(pattern, name)]
        if any(value != values[0] for value in values[1:]):
            different.append(f"{what} differs between layers")
        elif values:
            noted[what] = values[0]
    return noted, different


def _inconsistent(noted: Mapping[str, Any], sizes: Sizes) -> list[str]:
    """Return which settings cannot go with these sizes."""
    wrong = []
    for heads, width in (("heads", "dim"), ("backbone_heads", "width")):
        number = noted.get(heads, 1)
        if type(number) is not int or number < 1 or sizes.get(width, 0) % number:
            wrong.append(f"{number!r:.20} {heads} do not divide the {width} {sizes.get(width)}")
    taps = noted.get("taps")
    if taps is not None:
        blocks = range(1, sizes["backbone_depth"] + 1)
        known = isinstance(taps, tuple) and all(type(tap) is int and tap in blocks for tap in taps)
        if not known or len(taps) != sizes["taps"] or list(taps) != sorted(set(taps)):
            wrong.append(f"the taps {taps!r:.40}, with {sizes['taps']} of {sizes['backbone_depth']} blocks tapped")
    for name in ("adapter_scale", "dropout", "registers"):
        if name in noted and (type(noted[name]) not in (int, float) or not math.isfinite(noted[name])):
            wrong.append(f"{name} is {noted[name]!r:.40}, no number")
    return wrong


def some(names: Sequence[str], most: int = 6) -> str:
    """Return a list of names for a message: the first few, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
