from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmark import checkpoint, training
from benchmark.errors import UserError
from benchmark.tracking import NoTracker, Tracker
from benchmark.training import PlateauState, TrainResult, learning_rate_factor, train
from benchmark.training_config import (
    Constant,
    GroupConfig,
    LinearWarmup,
    OneCycle,
    OptimiserConfig,
    Plateau,
    TrainingConfig,
    WarmupPlateau,
)

SUBJECTS, FEATURES, OUTPUTS = 5, 6, 3


class Bars:
    """A progress display that remembers how it was used."""

    def __init__(self) -> None:
        self.start, self.total, self.done = -1, -1, 0
        self.texts: list[str] = []

    @contextmanager
    def bar(self, title: str, total: int, start: int, /) -> Iterator[Bars]:
        self.start = self.done = start
        self.total = total
        yield self

    def advance(self, steps: int, text: str, /) -> None:
        self.done += steps
        self.texts.append(text)


class Logs(NoTracker):
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))


@dataclass
class Context:
    checkpoints: Path
    tracker: Tracker = field(default_factory=NoTracker)
    progress: Bars = field(default_factory=Bars)
    device: str = "cpu"
    checkpoint_seconds: float = math.inf


class Net(nn.Module):
    """A voxel embedding and an MLP, with what makes resuming hard: dropout and batch norm."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Embedding(SUBJECTS, 4)
        self.hidden = nn.Linear(FEATURES + 4, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(8, OUTPUTS)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor, who: Tensor) -> Tensor:
        hidden = self.hidden(torch.cat([x, self.embedding(who)], dim=1))
        result: Tensor = self.out(self.dropout(self.norm(hidden).relu()))
        return result


def problem(
    net: Net, batch: int = 6
) -> tuple[Callable[..., tuple[Tensor, dict[str, float]]], Callable[[], dict[str, float]]]:
    """Make the batches and the validation of a regression; the validation is noisy so that its seeding shows."""
    fixed = torch.Generator().manual_seed(11)
    x = torch.randn(40, FEATURES, generator=fixed)
    who = torch.randint(SUBJECTS, (40,), generator=fixed)
    y = torch.tanh(x @ torch.randn(FEATURES, OUTPUTS, generator=fixed)) + who[:, None] * 0.1

    def batch_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(30, (batch,), generator=generator)
        loss = (net(x[rows], who[rows]) - y[rows]).square().mean()
        return loss, {"rows": rows.float().mean().item()}

    def validate() -> dict[str, float]:
        error = (net(x[30:] + 0.01 * torch.randn(10, FEATURES), who[30:]) - y[30:]).square().mean().item()
        return {"loss": error, "score": -error}

    return batch_loss, validate


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def assert_same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# -- configuration and schedules


def test_config_is_light_and_frozen() -> None:
    code = "import sys, benchmark.training_config; assert not {'torch', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    config = TrainingConfig(steps=3)
    assert TrainingConfig.model_validate(json.loads(config.model_dump_json())) == config
    with pytest.raises(ValidationError):
        config.steps = 4


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, "either steps or epochs"),
        ({"steps": 3, "epochs": 2, "steps_per_epoch": 2}, "either steps or epochs"),
        ({"epochs": 3}, "steps_per_epoch"),
        ({"steps": 3, "lr": 1}, "Extra inputs"),
        ({"steps": 3, "schedule": {"kind": "cosine"}}, "one-cycle"),
        ({"steps": 3, "schedule": {"kind": "constant", "warmup": 0.1}}, "Extra inputs"),
        ({"steps": 3, "schedule": WarmupPlateau()}, "name it in select"),
        ({"steps": 3, "schedule": Plateau(), "select": "r"}, "select_mode"),
        ({"steps": 8, "validate_every": 2, "schedule": WarmupPlateau(), "select": "r"}, "validate_every"),
    ],
)
def test_config_refuses(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        TrainingConfig(**values)


def rates_of(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    rates: list[float] = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize(("steps", "warmup"), [(40, 0.3), (33, 0.1), (7, 0.5)])
def test_one_cycle_is_torchs(steps: int, warmup: float) -> None:
    reference = torch.optim.lr_scheduler.OneCycleLR(
        sgd(), 1.0, total_steps=steps, pct_start=warmup, cycle_momentum=False
    )
    rates = [learning_rate_factor(OneCycle(warmup=warmup), step, steps, steps) for step in range(steps)]
    assert rates == pytest.approx(rates_of(reference, steps), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
def test_one_cycle_of_few_steps(steps: int, warmup: float) -> None:
    rates = [learning_rate_factor(OneCycle(warmup=warmup), step, steps, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_linear_warmup_is_torchs() -> None:
    reference = torch.optim.lr_scheduler.LinearLR(sgd(), start_factor=1e-6, total_iters=10)
    rates = [learning_rate_factor(LinearWarmup(warmup_steps=10), step, 15, 15) for step in range(15)]
    assert rates == pytest.approx(rates_of(reference, 15), rel=1e-9)


def test_warmup_plateau_starts_as_in_the_official_code() -> None:
    rates = [learning_rate_factor(WarmupPlateau(), step, 400, 20, plateau=0.01) for step in range(400)]
    for step, rate in enumerate(rates):
        epoch = step // 20
        assert rate == pytest.approx(1e-3 + 0.999 * (epoch / 15) ** 3 if epoch < 15 else 0.01)
    assert learning_rate_factor(Constant(), 7, 10, 5) == 1.0


@settings(max_examples=50, deadline=None)
@given(
    metrics=st.lists(st.floats(-1, 1), min_size=1, max_size=40),
    mode=st.sampled_from(["min", "max"]),
    patience=st.integers(0, 5),
    threshold=st.sampled_from([0.0, 1e-3, 0.3]),
)
def test_plateau_is_torchs(metrics: list[float], mode: Any, patience: int, threshold: float) -> None:
    optimiser = sgd()
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, mode, 0.1, patience, threshold=threshold, threshold_mode="abs", eps=0
    )
    schedule, state = Plateau(patience=patience, threshold=threshold), PlateauState()
    for metric in metrics:
        reference.step(metric)
        state.update(metric, schedule, mode)
        assert state.factor == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9)


# -- the loop


@pytest.mark.parametrize("name", ["adamw", "adam-amsgrad"])
def test_the_loop_equals_one_written_out(tmp_path: Path, name: Any) -> None:
    config = TrainingConfig(
        optimiser=OptimiserConfig(name=name, lr=0.02, groups={"voxels": GroupConfig(lr=0.1, weight_decay=0.0)}),
        schedule=OneCycle(warmup=0.3),
        steps=12,
        accumulate=2,
        clip=0.5,
    )
    net = Net()
    batches: list[tuple[int, Tensor]] = []
    batch_loss, _ = problem(net)

    def recording(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batches.append((step, generator.get_state()))
        return batch_loss(step, generator)

    groups = {"voxels": net.embedding.parameters(), "unused": [net.out.bias]}
    result = train(net, recording, config=config, ctx=Context(tmp_path), label="test", parameter_groups=groups)
    assert (result.steps, result.best_step, result.best, result.stopped) == (12, 12, {}, "all steps done")
    assert [step for step, _ in batches] == list(range(24))

    other = Net()
    other_loss, _ = problem(other)
    rest = [value for key, value in other.named_parameters() if not key.startswith("embedding")]
    decay = 0.01 if name == "adamw" else 0.0
    kinds = {"adamw": torch.optim.AdamW, "adam-amsgrad": lambda g: torch.optim.Adam(g, amsgrad=True)}
    optimiser = kinds[name](
        [
            {"params": other.embedding.parameters(), "lr": 0.1, "weight_decay": 0.0},
            {"params": rest, "lr": 0.02, "weight_decay": decay},
        ]
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, [0.1, 0.02], total_steps=12, pct_start=0.3, cycle_momentum=False
    )
    for step in range(12):
        for _, state in batches[2 * step : 2 * step + 2]:
            generator = torch.Generator()
            generator.set_state(state)
            torch.autograd.backward(other_loss(0, generator)[0] / 2)
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimiser.step()
        optimiser.zero_grad()
        scheduler.step()
    for key, value in weights(net).items():
        torch.testing.assert_close(value, other.state_dict()[key], rtol=1e-4, atol=1e-6)


def test_best_weights_are_kept(tmp_path: Path) -> None:
    net = Net()
    batch_loss, _ = problem(net)
    scores = iter([3.0, 1.0, 2.0, 1.0])
    seen: list[dict[str, Tensor]] = []

    def validate() -> dict[str, float]:
        assert not net.training and not torch.is_grad_enabled()
        seen.append(weights(net))
        return {"loss": next(scores), "other": 7.0}

    config = TrainingConfig(epochs=4, steps_per_epoch=3, select="loss")
    logs = Logs()
    ctx = Context(tmp_path, tracker=logs)
    result = train(net, batch_loss, config=config, ctx=ctx, label="Low-level BIT", validate=validate, log_every=4)
    assert (result.best_step, result.best) == (6, {"loss": 1.0, "other": 7.0})
    assert [entry["step"] for entry in result.history] == [3, 6, 9, 12]
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3, 4]
    assert all(entry["train_loss"] > 0 for entry in result.history)
    assert_same_weights(weights(net), seen[1])
    assert not torch.equal(seen[1]["out.weight"], seen[3]["out.weight"])
    assert (ctx.progress.start, ctx.progress.done, ctx.progress.total) == (0, 12, 12)
    assert ctx.progress.texts[-1].startswith("loss ")
    assert [step for step, values in logs.logged if "train/loss" in values] == [4, 8, 12]
    assert [step for step, values in logs.logged if "validation/loss" in values] == [3, 6, 9, 12]
    assert logs.logged[1][1].keys() == {"train/loss", "train/rows", "train/lr", "epoch"}


def test_last_weights_are_kept_without_selection(tmp_path: Path) -> None:
    net = Net()
    batch_loss, validate = problem(net)
    config = TrainingConfig(steps=7, validate_every=3)
    result = train(net, batch_loss, config=config, ctx=Context(tmp_path), label="test", validate=validate)
    assert [entry["step"] for entry in result.history] == [3, 6, 7]
    assert result.best_step == 7
    assert result.best == {key: result.history[-1][key] for key in ("loss", "score")}


def test_plateau_lowers_the_rate_and_ends_the_training(tmp_path: Path) -> None:
    net = Net()
    batch_loss, _ = problem(net)
    config = TrainingConfig(
        optimiser=OptimiserConfig(name="adam-amsgrad", lr=1e-3),
        schedule=Plateau(patience=1),
        epochs=50,
        steps_per_epoch=2,
        select="r",
        select_mode="max",
    )
    logs = Logs()
    result = train(
        net,
        batch_loss,
        config=config,
        ctx=Context(tmp_path, tracker=logs),
        label="encoder",
        validate=lambda: {"r": 0.1},
        log_every=1,
    )
    rates = [values["train/lr"] for _, values in logs.logged if "train/lr" in values]
    # The first epoch sets the best; after two without progress the rate falls, from the next epoch on.
    expected = [1e-3] * 6 + [1e-4] * 4 + [1e-5] * 4 + [1e-6] * 4 + [1e-7] * 4
    assert rates == pytest.approx(expected)
    assert result.steps == 22 and result.stopped == "the learning rate fell below 1e-07"


def test_frozen_parameters_and_eval_parts(tmp_path: Path) -> None:
    net = Net(norm=True)
    net.hidden.requires_grad_(False)
    before = weights(net)
    batch_loss, _ = problem(net)
    ctx = Context(tmp_path)
    train(net, batch_loss, config=TrainingConfig(steps=4), ctx=ctx, label="test")
    found = checkpoint.load(tmp_path / "test")
    assert found is not None
    assert not [name for name in found[0] if "hidden" in name]
    assert "model/norm.running_mean" in found[0] and "optimiser/exp_avg/out.weight" in found[0]
    assert torch.equal(net.hidden.weight, before["hidden.weight"])
    assert not torch.equal(net.out.weight, before["out.weight"])
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        train(net, batch_loss, config=TrainingConfig(steps=4), ctx=ctx, label="other")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops(tmp_path: Path, bad: float) -> None:
    net = Net()
    batch_loss, validate = problem(net)

    def breaks(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = batch_loss(step, generator)
        return (loss * bad if step == 5 else loss), metrics

    ctx = Context(tmp_path, checkpoint_seconds=0.0)
    with pytest.raises(RuntimeError, match=r"semantic BIT: the loss is (nan|inf) at step 5 of 9"):
        train(net, breaks, config=TrainingConfig(steps=9), ctx=ctx, label="semantic BIT", validate=validate)
    found = checkpoint.load(tmp_path / "semantic-bit")
    assert found is not None and found[1]["progress"]["step"] == 5
    assert all(tensor.isfinite().all() for tensor in found[0].values())


def test_bad_calls(tmp_path: Path) -> None:
    net = Net()
    batch_loss, validate = problem(net)
    ctx = Context(tmp_path)

    def call(config: TrainingConfig, **more: Any) -> TrainResult:
        return train(net, batch_loss, config=config, ctx=ctx, label="test", **more)

    with pytest.raises(ValueError, match="no validate function"):
        call(TrainingConfig(steps=2, select="loss"))
    with pytest.raises(ValueError, match=r"validation returned \['loss', 'score'\], not 'r'"):
        call(TrainingConfig(steps=2, select="r"), validate=validate)
    with pytest.raises(RuntimeError, match="'r' is nan after step 2"):
        call(TrainingConfig(steps=2, select="r"), validate=lambda: {"r": math.nan})
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        call(TrainingConfig(steps=2, precision="fp16"))
    with pytest.raises(ValueError, match=r"settings for groups \['voxel'\], but the groups here are \['voxels'\]"):
        call(
            TrainingConfig(steps=2, optimiser=OptimiserConfig(groups={"voxel": GroupConfig()})),
            parameter_groups={"voxels": net.embedding.parameters()},
        )


# --- reading ahead ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulate", "threads"), [(1, 1), (3, 1), (1, 3)])
def test_reading_ahead_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, threads: int
) -> None:
    """Against steps that make their batch themselves; chance goes on where reading left it, and dropout is its own."""
    monkeypatch.setattr(training, "reading_threads", lambda: threads)
    fixed = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, FEATURES, generator=fixed), torch.randn(40, OUTPUTS, generator=fixed)
    found = {}
    for way in ("itself", "read", "read ahead"):
        net = Net(dropout=0.3)

        def read(step: int, generator: torch.Generator) -> Tensor:
            time.sleep(0.01 * (step % 3 == 0))  # a later batch may be there before an earlier one
            return torch.randint(40, (6,), generator=generator)

        def of_rows(rows: Tensor, generator: torch.Generator, net: Net = net) -> tuple[Tensor, dict[str, float]]:
            noise = torch.randn(6, FEATURES, generator=generator)
            return (net(x[rows] + noise, rows % SUBJECTS) - y[rows]).square().mean(), {}

        def itself(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
            return of_rows(read(step, generator), generator)

        reading = {} if way == "itself" else {"read": read, "read_ahead": way == "read ahead"}
        loss = itself if way == "itself" else of_rows
        config = TrainingConfig(steps=7, accumulate=accumulate, seed=4)
        torch.manual_seed(99)  # is not used, and not moved
        train(net, loss, config=config, ctx=Context(tmp_path / way), label="test", **reading)
        found[way] = weights(net) | {"torch's own": torch.rand(3)}
    for way in ("read", "read ahead"):
        assert all(torch.equal(found[way][name], value) for name, value in found["itself"].items()), way


def test_a_batch_is_read_while_the_step_before_computes(tmp_path: Path) -> None:
    net, begun = Net(), [threading.Event() for _ in range(5)]
    threads: list[tuple[threading.Thread, int]] = []
    batch_loss, _ = problem(net)

    def read(step: int, generator: torch.Generator) -> int:
        threads.append((threading.current_thread(), torch.get_num_threads()))
        begun[step].set()
        return step

    def waits(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if step < 4:
            assert begun[step + 1].wait(30), "the next batch is on its way"
        return batch_loss(step, generator)

    own = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(net, waits, config=TrainingConfig(steps=5), ctx=Context(tmp_path), label="test", read=read)
        assert torch.get_num_threads() == 2, "the step keeps its threads"
    finally:
        torch.set_num_threads(own)
    assert len(threads) == 5, "and nothing is read that no step needs"
    assert {number for _, number in threads} == {1}, "reading keeps to one thread"
    (reader,) = {thread for thread, _ in threads}
    assert reader is not threading.current_thread() and not reader.is_alive()


def test_what_reading_raises_is_raised_by_the_step_that_needs_it(tmp_path: Path) -> None:
    net, steps = Net(), []
    batch_loss, _ = problem(net)

    def read(step: int, generator: torch.Generator) -> int:
        if step == 3:
            raise OSError("shard 7 cannot be read")
        return step

    def counted(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        steps.append(step)
        return batch_loss(step, generator)

    ctx = Context(tmp_path, checkpoint_seconds=0.0)
    with pytest.raises(OSError, match="shard 7 cannot be read"):
        train(net, counted, config=TrainingConfig(steps=9), ctx=ctx, label="test", read=read)
    assert steps == [0, 1, 2]
    found = checkpoint.load(tmp_path / "test")
    assert found is not None and found[1]["progress"]["step"] == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


def test_running_mean_of_the_weights(tmp_path: Path) -> None:
    net = Net()
    batch_loss, _ = problem(net)
    raw: list[Tensor] = []
    validated: list[Tensor] = []

    def recording(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        raw.append(net.out.weight.detach().clone())
        return batch_loss(step, generator)

    def validate() -> dict[str, float]:
        validated.append(net.out.weight.detach().clone())
        return {}

    config = TrainingConfig(steps=6, validate_every=1, ema=0.3, optimiser=OptimiserConfig(lr=0.05))
    train(net, recording, config=config, ctx=Context(tmp_path), label="test", validate=validate)
    mean = raw[0]
    for step, after in enumerate(raw[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * after
        torch.testing.assert_close(validated[step], mean)
    assert torch.equal(net.out.weight, validated[-1])


def test_precision_changes_from_one_training_to_the_next(tmp_path: Path) -> None:
    outcomes: dict[str, dict[str, Tensor]] = {}
    for precision in ("fp32", "bf16", "fp32"):
        net = Net()
        batch_loss, _ = problem(net)
        kinds: list[torch.dtype] = []
        net.out.register_forward_hook(lambda *a, kinds=kinds: kinds.append(a[-1].dtype))
        config = TrainingConfig(steps=3, precision=precision)
        train(net, batch_loss, config=config, ctx=Context(tmp_path / str(len(outcomes))), label=precision)
        assert set(kinds) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert net.out.weight.dtype == torch.float32
        if precision in outcomes:
            assert_same_weights(outcomes[precision], weights(net))
        outcomes[precision] = weights(net)


def test_gradient_scaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the arithmetic around fp16's scaler, with a scaler on the CPU and float32: powers of two change no bit."""
    plain = Net()
    config = TrainingConfig(steps=8, accumulate=2, clip=0.5)
    interrupted(Context(tmp_path / "plain"), plain, config, at=-1)

    make = training._accelerator

    def use_scaler(exponent: int) -> None:
        def with_scaler(*arguments: Any) -> Any:
            accelerator = make(*arguments)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent, growth_interval=3)
            return accelerator

        monkeypatch.setattr(training, "_accelerator", with_scaler)

    use_scaler(10)
    scaled = Net()
    interrupted(Context(tmp_path / "scaled"), scaled, config, at=-1)
    for name, value in weights(plain).items():
        torch.testing.assert_close(scaled.state_dict()[name], value, rtol=1e-6, atol=1e-8)

    use_scaler(127)  # overflows float32: the first steps are skipped and the scale falls
    overflowing = Net()
    interrupted(Context(tmp_path / "overflowing"), overflowing, config, at=-1, weight=64.0)
    found = checkpoint.load(tmp_path / "overflowing" / "test")
    assert found is not None and 0 < found[1]["scaler"]["scale"] < 2.0**127
    assert 0 < found[0]["optimiser/step/out.weight"] < 8
    with pytest.raises(KeyboardInterrupt):
        interrupted(Context(tmp_path / "resumed"), Net(), config, at=9, weight=64.0)
    resumed = Net()
    interrupted(Context(tmp_path / "resumed"), resumed, config, at=9, weight=64.0)
    assert_same_weights(weights(resumed), weights(overflowing))


def test_the_seed_decides_and_not_the_global_state(tmp_path: Path) -> None:
    def outcome(name: str, seed: int) -> dict[str, Tensor]:
        net = Net(dropout=0.3)
        batch_loss, _ = problem(net)
        torch.manual_seed(len(name))
        before = torch.get_rng_state()
        train(net, batch_loss, config=TrainingConfig(steps=4, seed=seed), ctx=Context(tmp_path / name), label="test")
        assert torch.equal(torch.get_rng_state(), before)
        return weights(net)

    first = outcome("a", 0)
    assert_same_weights(first, outcome("bb", 0))
    assert not torch.equal(first["out.weight"], outcome("ccc", 1)["out.weight"])


# -- checkpoints and signals


def interrupted(
    ctx: Context, net: Net, config: TrainingConfig, at: int, number: int = signal.SIGTERM, weight: float = 1.0
) -> TrainResult:
    """Train and send this process a signal in the middle of micro-step ``at``."""
    batch_loss, validate = problem(net)

    def signalling(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if step == at:
            os.kill(os.getpid(), number)
        loss, metrics = batch_loss(step, generator)
        return loss * weight, metrics

    return train(net, signalling, config=config, ctx=ctx, label="test", validate=validate)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_write_a_checkpoint(tmp_path: Path, number: int) -> None:
    config = TrainingConfig(steps=9, validate_every=2, select="loss")
    undisturbed = Net(0.2)
    expected = interrupted(Context(tmp_path / "undisturbed"), undisturbed, config, at=-1)
    before = signal.getsignal(number)
    ctx = Context(tmp_path / "disturbed")
    with pytest.raises(KeyboardInterrupt):
        interrupted(ctx, Net(0.2), config, at=4, number=number)
    assert signal.getsignal(number) == before
    net = Net(0.2)
    result = interrupted(ctx, net, config, at=4, number=number)  # not reached again
    assert ctx.progress.start == 5
    assert_same_weights(weights(net), weights(undisturbed))
    assert result.history == expected.history and result.best_step == expected.best_step

    again = Net(0.2)  # a finished training is not repeated
    assert interrupted(ctx, again, config, at=0, number=number) == result
    assert_same_weights(weights(again), weights(undisturbed))
    assert ctx.progress.start == 9


def test_a_signal_during_the_last_step_is_not_lost(tmp_path: Path) -> None:
    ctx, config = Context(tmp_path), TrainingConfig(steps=3)
    with pytest.raises(KeyboardInterrupt):
        interrupted(ctx, Net(), config, at=2)
    assert interrupted(ctx, Net(), config, at=2).steps == 3
    assert ctx.progress.start == 3


def test_a_signal_goes_on_to_the_handler_that_was_there(tmp_path: Path) -> None:
    calls: list[int] = []

    def ignoring(number: int, _: FrameType | None) -> None:
        calls.append(number)

    def leaving(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        signal.signal(signal.SIGUSR2, ignoring)
        signal.signal(signal.SIGTERM, leaving)
        config = TrainingConfig(steps=6)
        assert interrupted(Context(tmp_path / "a"), Net(), config, at=2, number=signal.SIGUSR2).steps == 6
        assert calls == [signal.SIGUSR2]
        with pytest.raises(SystemExit, match="143"):
            interrupted(Context(tmp_path / "b"), Net(), config, at=2)
        found = checkpoint.load(tmp_path / "b" / "test")
        assert found is not None and found[1]["progress"]["step"] == 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("damage", ["half", "flipped", "no state", "half state", "no tensors", "unfinished"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(4):
        checkpoint.save(tmp_path, {"a": torch.full((9,), float(number))}, {"step": number})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-000002", "checkpoint-000003"]
    newest = tmp_path / "checkpoint-000003"
    tensors, state = newest / "tensors.safetensors", newest / "state.json"
    content = bytearray(tensors.read_bytes())
    if damage == "half":
        tensors.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-3] ^= 1
        tensors.write_bytes(content)
    elif damage == "no state":
        state.unlink()
    elif damage == "half state":
        state.write_text(state.read_text()[:10])
    elif damage == "no tensors":
        tensors.unlink()
    else:
        newest.rename(tmp_path / "unfinished")
    found = checkpoint.load(tmp_path)
    assert found is not None and found[1] == {"step": 2} and found[0]["a"][0] == 2
    assert ("is damaged" in caplog.text) == (damage != "unfinished")
    checkpoint.save(tmp_path, {"a": torch.zeros(1)}, {"step": 9})
    found = checkpoint.load(tmp_path)
    assert found is not None and found[1] == {"step": 9}
    assert checkpoint.load(tmp_path / "nowhere") is None


def test_a_checkpoint_of_another_configuration_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ctx = Context(tmp_path)
    interrupted(ctx, Net(), TrainingConfig(steps=4), at=-1)
    interrupted(ctx, Net(), TrainingConfig(steps=4, seed=1), at=-1)
    assert ctx.progress.start == 0 and "another configuration" in caplog.text


# -- kill -9. The children are forked from one process that has imported everything and has not used autograd.

STEPS = 16
SCENARIOS: dict[str, dict[str, Any]] = {
    "adamw, one-cycle, dropout, groups, clipping": {
        "optimiser": {"lr": 0.02, "groups": {"voxels": {"lr": 0.05, "weight_decay": 0.0}}},
        "schedule": {"kind": "one-cycle"},
        "clip": 0.7,
        "validate_every": 5,
        "select": "loss",
    },
    "amsgrad, plateau, accumulation": {
        "optimiser": {"name": "adam-amsgrad", "lr": 0.02},
        "schedule": {"kind": "plateau-max", "patience": 0, "threshold": 0.05, "min_lr": 0},
        "steps_per_epoch": 2,
        "accumulate": 2,
        "select": "score",
        "select_mode": "max",
    },
    "warm-up, plateau, bf16, running mean": {
        "schedule": {"kind": "warmup-plateau", "warmup_epochs": 2, "patience": 0, "threshold": 0.05},
        "steps_per_epoch": 3,
        "precision": "bf16",
        "ema": 0.8,
        "select": "loss",
    },
}
KILLS = 4


def run_scenario(name: str, folder: Path, micro_steps: tuple[int, ...] = (), renames: tuple[int, ...] = ()) -> None:
    """Train, and kill this very process at one of these micro-steps, or at one of these checkpoints being written."""
    torch.set_num_threads(1)
    config = TrainingConfig(**SCENARIOS[name], steps=STEPS)
    net = Net(dropout=0.3, norm=True)
    batch_loss, validate = problem(net)
    rename, count = os.rename, iter(range(10**6))

    def kills(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if step in micro_steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch_loss(step, generator)

    def rename_kills(source: Path, target: Path) -> None:
        at = next(count)
        if at in renames:
            if at % 2:  # half of the tensors were written
                os.truncate(source / checkpoint.TENSORS, 200)
            else:  # written and renamed, but not yet known to be
                rename(source, target)
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    checkpoint.os.rename = rename_kills  # type: ignore[attr-defined]
    ctx = Context(folder / "checkpoints", checkpoint_seconds=0.0 if micro_steps or renames else math.inf)
    groups = {"voxels": net.embedding.parameters()}
    result = train(net, kills, config=config, ctx=ctx, label=name, validate=validate, parameter_groups=groups)
    save_file(weights(net), folder / "final.safetensors")
    found = {
        "history": result.history,
        "best_step": result.best_step,
        "steps": result.steps,
        "start": ctx.progress.start,
    }
    (folder / "final.json").write_text(json.dumps(found))


def fork(action: Callable[[], None]) -> int:
    """Run ``action`` in a forked process and return the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a child failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


RANKS = {  # processes of each run of one training, all but the last of which are killed half-way
    "one": (1,),
    "two": (2,),
    "two, then one": (2, 1),
    "one, then four": (1, 4),
    "four, then two": (4, 2),
}
MICRO_BATCHES, RANK_STEPS, KILLED_AT = 4, 6, 3


def run_ranks(folder: Path, worlds: tuple[int, ...]) -> None:
    """Train in so many processes of one machine that share a step's batches; each run goes on from the one before."""

    def one(rank: int, world: int, port: int, last: bool) -> None:
        torch.set_num_threads(1)
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"OMP_NUM_THREADS": "1"}
        net = Net(dropout=0.3)
        batch_loss, validate = problem(net)

        def kills(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
            if not last and step >= KILLED_AT * MICRO_BATCHES:
                os.kill(os.getpid(), signal.SIGKILL)
            return batch_loss(step, generator)

        logs = Logs()
        config = TrainingConfig(
            steps=RANK_STEPS, accumulate=MICRO_BATCHES // world, validate_every=2, select="loss", ema=0.8
        )
        ctx = Context(folder / "checkpoints", tracker=logs, checkpoint_seconds=0.0)
        result = train(net, kills, config=config, ctx=ctx, label="ranks", validate=validate, log_every=2)
        save_file(weights(net), folder / f"{rank}.safetensors")
        found = {"best_step": result.best_step, "history": result.history, "start": ctx.progress.start}
        found |= {"logged": len(logs.logged), "shown": ctx.progress.total}
        (folder / f"{rank}.json").write_text(json.dumps(found))
        if world > 1:
            torch.distributed.destroy_process_group()

    folder.mkdir()
    for number, world in enumerate(worlds):
        last = number == len(worlds) - 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        others = []
        for rank in range(1, world):
            if (child := os.fork()) == 0:
                one(rank, world, port, last)
                os._exit(0)
            others.append(child)
        ended = fork(lambda world=world, port=port, last=last: one(0, world, port, last))  # type: ignore[misc]
        assert ended == (0 if last else signal.SIGKILL)
        for child in others:
            os.waitpid(child, 0)


def main(folder: Path) -> None:
    """Run all scenarios below ``folder``; the tests look at what they left."""
    sgd().step()  # the first step of a process imports a thousand modules: once here, not in every child
    random_points = random.Random(5)
    for number, name in enumerate(SCENARIOS):
        reference, killed = folder / str(number) / "undisturbed", folder / str(number) / "killed"
        reference.mkdir(parents=True)
        killed.mkdir()
        assert fork(lambda name=name, reference=reference: run_scenario(name, reference)) == 0  # type: ignore[misc]
        micro_steps = STEPS * SCENARIOS[name].get("accumulate", 1)
        ends = []
        for point in sorted(random_points.sample(range(1, micro_steps), KILLS)):
            ends.append(fork(lambda n=name, k=killed, p=point: run_scenario(n, k, micro_steps=(p,))))  # type: ignore[misc]
            ends.append(fork(lambda n=name, k=killed: run_scenario(n, k, renames=(random_points.randrange(2),))))  # type: ignore[misc]
        fork(lambda name=name, killed=killed: run_scenario(name, killed))  # type: ignore[misc]
        (killed / "ends.json").write_text(json.dumps(ends))
    for name, worlds in RANKS.items():
        run_ranks(folder / name, worlds)


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenarios")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("number", range(len(SCENARIOS)), ids=list(SCENARIOS))
def test_killed_and_resumed_is_bit_identical(scenarios: Path, number: int) -> None:
    reference, killed = scenarios / str(number) / "undisturbed", scenarios / str(number) / "killed"
    assert json.loads((killed / "ends.json").read_text()).count(signal.SIGKILL) >= KILLS
    expected, found = (json.loads((folder / "final.json").read_text()) for folder in (reference, killed))
    assert expected.pop("start") == 0 and found.pop("start") > 0
    assert found == expected
    assert_same_weights(load_file(killed / "final.safetensors"), load_file(reference / "final.safetensors"))


def ranks(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "0.json").read_text()), load_file(folder / "0.safetensors")


@pytest.mark.parametrize("name", list(RANKS)[1:])
def test_any_number_of_processes_trains_as_one(scenarios: Path, name: str) -> None:
    """They share a step's batches, and the checkpoint that others wrote is theirs too."""
    (alone, expected), (found, trained) = ranks(scenarios / "one"), ranks(scenarios / name)
    assert found["start"] == (KILLED_AT if len(RANKS[name]) > 1 else 0)
    assert found["best_step"] == alone["best_step"] and len(found["history"]) == len(alone["history"]) == 3
    for own, other in zip(found["history"], alone["history"], strict=True):
        assert own == pytest.approx(other, rel=1e-4)
    for weight, value in expected.items():
        torch.testing.assert_close(trained[weight], value, rtol=1e-4, atol=1e-6)


def test_one_of_the_processes_speaks_for_all(scenarios: Path) -> None:
    first, second = (json.loads((scenarios / "two" / f"{rank}.json").read_text()) for rank in range(2))
    assert first["logged"] > 0 and first["shown"] == RANK_STEPS
    assert second["logged"] == 0 and second["shown"] == -1
    assert second["history"] == first["history"]
    assert_same_weights(*(load_file(scenarios / "two" / f"{rank}.safetensors") for rank in range(2)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
