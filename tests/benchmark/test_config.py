"""Settings: the paper's values, the presets, and how one setting is changed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from benchmark.config import PRESETS, QUICK, Settings, Variant, demo, paper
from benchmark.data.settings import SimulationSettings
from benchmark.errors import UserError

# Brain-IT (ICLR 2026) and, where it is silent, the authors' code.
PAPER = {
    "track": "paper",
    "data.image_size": 256,
    "data.validation_fraction": 0.1,
    "data.external_images": None,
    "networks.encoder": "dinov2-vitl14-reg4",
    "networks.lowlevel": "vgg16-bn",
    "networks.semantic": "openclip-bigg14",
    "networks.generator": "sdxl-unclip",
    "encoder.taps": (1, 6, 12, 18, 24),
    "encoder.grid": 16,
    "encoder.input_size": 224,
    "encoder.embed_dim": 256,
    "encoder.inner": 128,
    "encoder.dropout": 0.25,
    "encoder.adapter_rank": 7,
    "encoder.voxels_per_example": 5000,
    "encoder.max_shift": 3,
    "encoder.batch": 32,
    "encoder.training.optimiser.name": "adam-amsgrad",
    "encoder.training.optimiser.lr": 1e-3,
    "encoder.training.optimiser.weight_decay": None,
    "encoder.training.epochs": 30,
    "encoder.training.schedule.kind": "plateau-max",
    "encoder.training.schedule.factor": 0.1,
    "encoder.training.schedule.patience": 4,
    "encoder.training.schedule.threshold": 3e-3,
    "encoder.training.schedule.min_lr": 1e-7,
    "encoder.training.precision": "fp32",
    "encoder.training.select_mode": "max",
    "clustering.n_clusters": 128,
    "clustering.covariance": "full",
    "clustering.max_iter": 100,
    "lowlevel.dim": 512,
    "lowlevel.depth": 5,
    "lowlevel.heads": 8,
    "lowlevel.voxels_per_example": 15000,
    "lowlevel.batch": 64,
    "lowlevel.external_fraction": None,
    "lowlevel.embedding_init": "random",
    "lowlevel.embedding_std": None,
    "lowlevel.width": 512,
    "lowlevel.input_size": 112,
    "lowlevel.layers": ("5", "12", "22", "32", "42"),
    "lowlevel.windows": ((2, 2), (2, 1), (1, 1), (1, 1), (1, 1)),
    "lowlevel.sampled": (512, 512, 128, 64, 16),
    "lowlevel.standardise": False,
    "lowlevel.centre": False,
    "lowlevel.scale": 1.0,
    "semantic.dim": 512,
    "semantic.depth": 5,
    "semantic.heads": 8,
    "semantic.voxels_per_example": 15000,
    "semantic.batch": 128,
    "joint.batch": 16,
    "joint.offset_noise": 0.04,
    "joint.training.accumulate": 4,
    "joint.training.epochs": 10,
    "joint.training.optimiser.name": "adamw",
    "joint.training.optimiser.lr": 1e-5,
    "joint.training.schedule.kind": "linear-warmup",
    "joint.training.schedule.warmup_steps": 1000,
    "joint.training.schedule.start": 1e-6,
    "joint.training.precision": "fp16",
    "dip.size": 224,
    "dip.steps": 2000,
    "dip.lr": 1e-3,
    "dip.channels": 128,
    "dip.skip": 2,
    "dip.depth": 32,
    "dip.input_noise": 1 / 30,
    "dip.ema": 0.99,
    "dip.calibrate": False,
    "dip.gain": 1.0,
    "generation.steps": 38,
    "generation.start_step": 14,
    "generation.guidance": 5.0,
    "generation.offset_noise": 0.04,
    "generation.contrast": 0.8,
    "generation.subjects": (1, 2, 5, 7),
    "generation.test_images": None,
    "score.protocol": "brain-it",
    **{
        f"{branch}.training.{key}": value
        for branch in ("lowlevel", "semantic")
        for key, value in {
            "epochs": 60,
            "optimiser.name": "adamw",
            "optimiser.lr": 5e-4,
            "optimiser.weight_decay": None,
            "schedule.kind": "warmup-plateau",
            "schedule.warmup_epochs": 15,
            "schedule.start": 1e-3,
            "schedule.factor": 0.1,
            "schedule.patience": 5,
            "schedule.threshold": 1e-3,
            "schedule.min_lr": 1e-7,
            "precision": "fp16",
            "clip": None,
            "select": "loss",
            "select_mode": "min",
        }.items()
    },
}

ALL = {"paper": paper(), "demo": demo(), "quick": demo().with_settings(QUICK)}


def read(variant: Variant, path: str) -> Any:
    place: Any = variant
    for name in path.split("."):
        place = getattr(place, name)
    return place


@pytest.mark.parametrize("path", PAPER)
def test_the_defaults_are_the_papers(path: str) -> None:
    assert read(paper(), path) == PAPER[path] == read(Variant(), path)


def test_the_demo_shrinks_sizes_and_keeps_the_method() -> None:
    """What the two presets share must be said in one place: a demo that drifts from the method shows something else."""
    same = [
        "data.validation_fraction",
        "encoder.training.select_mode",
        "clustering.n_clusters",
        "lowlevel.windows",
        "lowlevel.scale",
        "joint.offset_noise",
        "generation.offset_noise",
    ]
    assert {path: read(demo(), path) for path in same} == {path: read(paper(), path) for path in same}
    assert demo().track != paper().track and demo().score.protocol != paper().score.protocol


@pytest.mark.parametrize("name", ALL)
def test_every_preset_survives_json_and_yaml(name: str) -> None:
    variant = ALL[name]
    assert Variant.model_validate_json(variant.model_dump_json()) == variant
    plain = variant.model_dump(mode="json")
    assert Variant.model_validate(yaml.safe_load(yaml.safe_dump(plain))) == variant
    assert Variant.model_validate(json.loads(json.dumps(plain))) == variant
    assert set(PRESETS) == {"demo", "paper"}


def test_every_setting_says_what_it_is() -> None:
    def fields(model: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for name, field in model.model_fields.items():
            kinds = [k for k in (field.annotation, *get_args(field.annotation)) if isinstance(k, type)]
            inner = next((k for k in kinds if issubclass(k, Settings)), None)
            found |= fields(inner, f"{prefix}{name}.") if inner else {prefix + name: field.description}
        return found

    described = fields(Variant)
    assert len(described) > 60
    assert [name for name, text in described.items() if not text] == []


def test_settings_are_frozen_and_unknown_names_refused() -> None:
    variant = demo()
    with pytest.raises(ValidationError, match="frozen"):
        variant.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        variant.lowlevel.dim = 1
    for bad in ({"sead": 1}, {"lowlevel": {"dims": 3}}, {"lowlevel": {"training": {"step": 3}}}):
        with pytest.raises(ValidationError, match="Extra inputs"):
            Variant.model_validate(bad)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("seed", 7, 7),
        ("clustering.n_clusters", 8, 8),
        ("lowlevel.training.steps", 11, 11),
        ("lowlevel.training.optimiser.lr", "1e-3", 1e-3),  # YAML 1.1 reads 1e-3 as text
        ("lowlevel.training.optimiser.groups.voxels.lr", 0.5, 0.5),
        ("generation.subjects", [2, 1], (2, 1)),
        ("lowlevel.training.schedule", {"kind": "constant"}, None),
        ("data.simulation.subjects", 3, 3),
        ("data.simulation", None, None),
        ("lowlevel.voxels_per_example", 100, 100),
    ],
)
def test_with_settings_changes_one_thing(path: str, value: Any, expected: Any) -> None:
    before = demo()
    after = before.with_settings({path: value})
    found: Any = after.model_dump()
    for name in path.split("."):
        found = found[name]
    if expected is not None or value is None:
        assert found == expected
    top = path.split(".")[0]
    assert after != before == demo(), "the original stays as it was"
    assert {k: v for k, v in after if k != top} == {k: v for k, v in before if k != top}


def test_with_settings_takes_several_and_the_later_one_wins_over_a_whole() -> None:
    variant = demo().with_settings({**QUICK, "data.simulation.subjects": 2, "lowlevel.dim": 16, "lowlevel.heads": 2})
    assert variant.data.simulation == SimulationSettings(subjects=2, unique=200, shared=16, voxels=600, external=300)
    assert (variant.lowlevel.dim, variant.lowlevel.heads) == (16, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lowlevl.dim": 3}, "unknown setting 'lowlevl.dim' (did you mean 'lowlevel'?)"),
        ({"lowlevel.dimm": 3}, "unknown setting 'lowlevel.dimm' (did you mean 'dim'?)"),
        ({"lowlevel.dim.x": 3}, "unknown setting 'lowlevel.dim.x'"),
        ({"dip.dip": 3}, "unknown setting 'dip.dip' (did you mean 'skip'?)"),
        ({"": 3}, "unknown setting ''"),
        ({"lowlevel.training.optimiser.groups.queries.lr": 1}, "unknown setting 'lowlevel.training.optimiser.groups.queries.lr'"),
        ({"seed": -1}, "setting seed: Input should be greater than or equal to 0 (given -1)"),
        ({"encoder.dropout": "much"}, "setting encoder.dropout: Input should be a valid number, unable to parse string as a number (given 'much')"),
        ({"lowlevel.dim": 50, "lowlevel.heads": 4}, "setting lowlevel: dim 50 is no multiple of heads 4"),
        ({"lowlevel.layers": ["block0"]}, "setting lowlevel: 1 layers, 5 windows, 5 sampled; expected as many of each"),
        ({"generation.steps": 9, "generation.start_step": 9}, "setting generation: start_step 9; expected less than steps, which is 9"),
        ({"generation.subjects": []}, "setting generation.subjects: Tuple should have at least 1 item after validation, not 0 (given [])"),
        ({"lowlevel.training": {}}, "setting lowlevel.training: give either steps or epochs"),
        ({"data.simulation.subjects": 9}, "data.simulation.subjects 9: expected a number from 1 to 8"),
        ({"data.simulation": {"brains": 2}}, "setting data.simulation.brains: Unexpected keyword argument (given 2)"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        demo().with_settings(settings)
    assert str(caught.value) == message


def test_the_configuration_is_light_to_import() -> None:
    code = (
        "import sys, benchmark.config, benchmark.sweeps, benchmark.stages; "
        "print([m for m in ('torch', 'sklearn', 'pandas') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
