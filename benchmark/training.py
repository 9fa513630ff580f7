"""The one training loop: every stage that trains a network calls ``train``.

The loop owns the optimiser, the schedule, mixed precision, accumulation, checkpoints and the choice of the best
weights; the caller owns the network, the batch and the loss. Nothing random outlives a step: the generator that draws a
batch and torch's global generator (dropout) are seeded anew from (seed, micro-step), so a run that is killed at any
point and started again ends with the same bits as one that was never disturbed, and no data loader has a state to
restore. For the same reason threads may read the next batches while a step computes, and change nothing.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor, nn

from benchmark import checkpoint
from benchmark.errors import UserError
from benchmark.tracking.base import Tracker
from benchmark.training_config import LinearWarmup, OneCycle, Plateau, Schedule, TrainingConfig, WarmupPlateau

logger = logging.getLogger(__name__)

Read = Callable[[int, torch.Generator], Any]
"""(micro-step, CPU generator seeded for it) -> all that its loss needs of the disk and of chance before it computes."""

BatchLoss = Callable[[Any, torch.Generator], tuple[Tensor, Mapping[str, float | Tensor]]]
"""(what was read, or the micro-step where nothing is; the same generator) -> (scalar loss, further metrics to log)."""

Validate = Callable[[], Mapping[str, float]]
"""() -> validation metrics of the network as it is; called in eval mode and without gradients."""


class Bar(Protocol):
    """A progress bar that is being shown."""

    def advance(self, steps: int, text: str, /) -> None:
        """Move on by ``steps`` and show ``text`` beside the bar."""


class ProgressBars(Protocol):
    """What shows progress bars."""

    def bar(self, title: str, total: int, start: int, /) -> AbstractContextManager[Bar]:
        """Show a bar that begins at ``start``."""


class TrainingContext(Protocol):
    """What the loop needs of the stage that it runs in; a ``StageContext`` has it all."""

    @property
    def checkpoints(self) -> Path:
        """Folder for what a resumed run needs."""

    @property
    def tracker(self) -> Tracker:
        """Where metrics go."""

    @property
    def progress(self) -> ProgressBars:
        """Where progress is shown."""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""

    @property
    def checkpoint_seconds(self) -> float:
        """Seconds between checkpoints."""


@dataclass(frozen=True)
class TrainResult:
    """What a training came to; the network holds the weights of ``best_step``."""

    steps: int
    best_step: int
    best: dict[str, float]
    """Validation metrics at ``best_step``; empty without validation."""
    history: list[dict[str, float]]
    """One entry a validation: ``step``, ``epoch``, ``train_loss`` (mean since the one before) and its metrics."""
    seconds: float
    """Time spent in the loop, earlier interrupted runs included."""
    stopped: str
    """Why it ended: ``all steps done`` or what stopped it early."""


def train(
    model: nn.Module,
    batch_loss: BatchLoss,
    *,
    config: TrainingConfig,
    ctx: TrainingContext,
    label: str,
    read: Read | None = None,
    read_ahead: bool = True,
    validate: Validate | None = None,
    parameter_groups: Mapping[str, Iterable[nn.Parameter]] | None = None,
    log_every: int = 20,
    prefix: str = "",
) -> TrainResult:
    """Train ``model`` in place, from the newest checkpoint in ``ctx.checkpoints`` where there is one.

    The model is put in train mode for steps and in eval mode for validation; a part that must stay in eval mode
    overrides ``train()``. Parameters with ``requires_grad=False`` are left out of the optimiser and of checkpoints.

    Under several processes (``accelerate launch``, ``torchrun``) each takes its own micro-steps, so N processes and
    N-fold accumulation see the same batches, log the same losses up to rounding, and take up each other's checkpoints.

    Args:
        model: the network, on any device; it ends on ``ctx.device`` with the chosen weights.
        batch_loss: returns the mean loss over the batch of a micro-step, which it makes with the generator that it is
            given, or which ``read`` made. The micro-step counts from 0 over the whole training:
            ``(step * accumulate + k) * processes + rank``.
        config: everything that changes the result.
        ctx: where checkpoints, metrics and progress go, how often, and the device.
        label: what people read; also names the folder of the checkpoints, so two trainings of a stage need two labels.
        read: reads the batch of a micro-step. It must not use the network, nor torch's global generator.
        read_ahead: let threads read the next batches while a step computes.
        validate: returns the validation metrics; ``config.select`` names one of them.
        parameter_groups: group name -> parameters, for the groups in ``config.optimiser.groups``. A group that has no
            entry there is trained like the rest.
        log_every: steps between records of the training loss.
        prefix: put before the names of the metrics in the tracker.

    Raises:
        RuntimeError: if the loss or the selection metric stops being finite; the message names label and step.
        KeyboardInterrupt: on Ctrl-C, and on SIGTERM where nobody handles it. A signal waits until the step in hand is
            done and a checkpoint written; then the handler that was there before decides what happens.
        UserError: for fp16 without a GPU.
        ValueError: if config, groups and metrics do not fit together.
    """
    if config.select is not None and validate is None:
        raise ValueError(f"{label}: config.select is '{config.select}', but there is no validate function")
    if config.precision == "fp16" and ctx.device == "cpu":
        raise UserError(f"{label}: precision fp16 needs a GPU; set precision to bf16 or fp32")
    with _deterministic(ctx.device), _keep_random_state(ctx.device), _Signals() as signals:
        loop = _Loop(model, batch_loss, config, ctx, label, validate, parameter_groups or {}, prefix)
        loop.resume()
        bars = ctx.progress if loop.is_main else _NoBars()
        with (
            bars.bar(label, config.total_steps, loop.progress.step) as bar,
            _Batches(read, loop.generator_of, loop.micro_steps, ahead=read_ahead) as batches,
        ):
            return loop.run(bar, signals, batches, log_every)


def processes() -> int:
    """Return how many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def is_first_process() -> bool:
    """Return whether this process is the one whose results are kept."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def shared_out(config: TrainingConfig) -> TrainingConfig:
    """Return ``config`` for each of the processes that train together: their micro-batches stand for accumulated ones.

    Raises:
        UserError: the accumulation cannot be shared out evenly.
    """
    together = processes()
    if config.accumulate % together:
        raise UserError(
            f"{together} processes cannot share {config.accumulate} micro-batches a step evenly; "
            f"set training.accumulate to a multiple of {together}, or use fewer GPUs"
        )
    return config.model_copy(update={"accumulate": config.accumulate // together})


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def learning_rate_factor(
    schedule: Schedule, step: int, total_steps: int, epoch_steps: int, plateau: float = 1.0
) -> float:
    """Return what the learning rates are multiplied by in optimiser step ``step`` (from 0).

    Args:
        schedule: which schedule.
        step: optimiser step.
        total_steps: optimiser steps of the training.
        epoch_steps: optimiser steps of an epoch.
        plateau: the factor that plateaus have brought about so far.
    """
    match schedule:
        case OneCycle():
            first = 1 / schedule.start_div
            peak_step, last_step = max(schedule.warmup * total_steps - 1, 0.0), max(total_steps - 1, 1)
            if step < peak_step:
                return _cosine(first, 1.0, step / peak_step)
            return _cosine(1.0, first / schedule.final_div, (step - peak_step) / (last_step - peak_step))
        case WarmupPlateau():
            progress = (step // epoch_steps) / schedule.warmup_epochs
            return schedule.start + (1 - schedule.start) * progress**3 if progress < 1 else plateau
        case Plateau():
            return plateau
        case LinearWarmup():
            return schedule.start + (1 - schedule.start) * min(step / schedule.warmup_steps, 1.0)
        case _:
            return 1.0


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


@dataclass
class PlateauState:
    """Counts epochs without progress (torch's ReduceLROnPlateau with an absolute threshold)."""

    factor: float = 1.0
    best: float | None = None
    bad_epochs: int = 0

    def update(self, metric: float, schedule: WarmupPlateau | Plateau, mode: str) -> None:
        """Take in the metric of an epoch."""
        gain = 0.0 if self.best is None else (self.best - metric if mode == "min" else metric - self.best)
        if self.best is None or gain > schedule.threshold:
            self.best, self.bad_epochs = metric, 0
        else:
            self.bad_epochs += 1
        if self.bad_epochs > schedule.patience:
            self.factor, self.bad_epochs = self.factor * schedule.factor, 0


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class _Progress:
    """Everything about a run, tensors apart, that a checkpoint must hold."""

    step: int = 0
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    plateau: PlateauState = field(default_factory=PlateauState)
    loss_sum: float = 0.0
    """Sum of the training losses since the last validation."""
    loss_count: int = 0
    seconds: float = 0.0
    stopped: str = ""


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What was read for a micro-step, and the generator that read it. DDP looks into tuples, not into this."""

    batch: Any
    generator: torch.Generator


class _Batches:
    """Reads the batches of this process's micro-steps while the steps before them compute.

    Results are those of reading when asked, since each micro-step has a generator of its own. What reading raises is
    raised by the step that needs the batch.
    """

    def __init__(
        self, read: Read | None, generator_of: Callable[[int], torch.Generator], micro_steps: range, *, ahead: bool
    ) -> None:
        self.read, self.generator_of, self.micro_steps = read, generator_of, micro_steps
        self.count = reading_threads() if ahead and read is not None else 0
        self.threads = _quiet_threads(self.count) if self.count else None
        self.begun: dict[int, Future[_Drawn]] = {}

    def __enter__(self) -> _Batches:
        return self

    def __exit__(self, *_: object) -> None:
        if self.threads is not None:
            self.threads.shutdown(cancel_futures=True)

    def take(self, micro_step: int) -> _Drawn:
        """Return what was read for a micro-step; those after it are begun, as many as there are threads."""
        if self.threads is None:
            return self._read(micro_step)
        self._begin(micro_step)
        drawn = self.begun.pop(micro_step).result()
        for number in range(1, self.count + 1):
            self._begin(micro_step + number * self.micro_steps.step)
        return drawn

    def _begin(self, micro_step: int) -> None:
        if micro_step in self.micro_steps and micro_step not in self.begun:
            assert self.threads is not None
            self.begun[micro_step] = self.threads.submit(self._read, micro_step)

    def _read(self, micro_step: int) -> _Drawn:
        generator = self.generator_of(micro_step)
        return _Drawn(micro_step if self.read is None else self.read(micro_step, generator), generator)


def reading_threads() -> int:
    """Return how many threads read ahead, each a batch: a fourth of the stage's, at most four."""
    return max(1, min(4, torch.get_num_threads() // 4))


def _quiet_threads(count: int) -> ThreadPoolExecutor:
    """Return threads whose torch operations stay in them: more teams of threads would fight for the step's cores."""
    own, all_there = torch.get_num_threads(), threading.Barrier(count)
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def alone() -> None:
        if gpu is not None:  # else pinned memory would be asked for in the name of the first GPU
            torch.cuda.set_device(gpu)
        torch.set_num_threads(1)
        torch.get_num_threads()  # torch takes the number over when it is first asked in a thread
        all_there.wait()

    threads = ThreadPoolExecutor(count, "read")
    for started in [threads.submit(alone) for _ in range(count)]:
        started.result()
    torch.set_num_threads(own)  # of this thread, and of those to come
    return threads


class _Forward(nn.Module):
    """The caller's loss as a module: accelerate wraps it (DDP, autocast), and the caller's network stays as it is."""

    def __init__(self, model: nn.Module, batch_loss: BatchLoss) -> None:
        super().__init__()
        self.model = model
        self.batch_loss = batch_loss

    def forward(self, drawn: _Drawn) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        return self.batch_loss(drawn.batch, drawn.generator)


class _Loop:
    def __init__(
        self,
        model: nn.Module,
        batch_loss: BatchLoss,
        config: TrainingConfig,
        ctx: TrainingContext,
        label: str,
        validate: Validate | None,
        parameter_groups: Mapping[str, Iterable[nn.Parameter]],
        prefix: str,
    ) -> None:
        self.model, self.config, self.ctx, self.label, self.validate = model, config, ctx, label, validate
        self.prefix = prefix
        self.folder = ctx.checkpoints / (re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "training")
        self.accelerator = _accelerator(config, ctx.device)
        self.is_main = self.accelerator.is_main_process
        self.forward = self.accelerator.prepare_model(_Forward(model, batch_loss))
        # By name, each once.
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if not self.parameters:
            raise ValueError(f"{label}: the model has no parameter that requires a gradient")
        groups = _optimiser_groups(self.parameters, parameter_groups, config, label)
        self.base_rates = [group["lr"] for group in groups]
        self.optimiser = _optimiser(groups, config, self.accelerator.device)
        self.ema = _copies(self.parameters) if config.ema is not None else {}
        self.best: dict[str, Tensor] = {}
        self.progress = _Progress()
        self.finished_before = False
        self.pending: list[tuple[int, Tensor, list[Mapping[str, float | Tensor]]]] = []  # losses not yet fetched
        self.since_log: dict[str, list[float]] = defaultdict(list)
        self.last_loss = math.nan

    # -- running

    def run(self, bar: Bar, signals: _Signals, batches: _Batches, log_every: int) -> TrainResult:
        config, progress, total = self.config, self.progress, self.config.total_steps
        validate_every = config.validate_every or config.epoch_steps
        start = time.perf_counter() - progress.seconds
        saved_at = shown_at = time.perf_counter()
        shown = progress.step
        self.model.train()
        while not progress.stopped:
            self._start_epoch()
            if progress.stopped:
                break
            rate = self._optimiser_step(batches)
            progress.step += 1
            step, now = progress.step, time.perf_counter()
            logs, validates = step % log_every == 0, step % validate_every == 0 or step == total
            signal_number = self._signal(signals)
            saves = bool(signal_number) or now - saved_at >= self.ctx.checkpoint_seconds
            shows = now - shown_at >= 0.1 or step == total
            if logs or validates or saves or shows:
                self._take_losses()
            if logs:
                self._log_training(rate)
            if shows:
                bar.advance(step - shown, f"loss {self.last_loss:.4g}")
                shown, shown_at = step, now
            if validates and self.validate is not None:
                self._validate(self.validate)
            if step == total:
                progress.stopped = "all steps done"
            elif saves:
                progress.seconds = time.perf_counter() - start
                self._save()
                saved_at = time.perf_counter()
                if signal_number:
                    signals.hand_on(signal_number)
        if shown < progress.step:
            bar.advance(progress.step - shown, progress.stopped)
        return self._finish(time.perf_counter() - start)

    def _finish(self, seconds: float) -> TrainResult:
        progress = self.progress
        if not self.finished_before:
            progress.seconds = seconds
            self._save()
        _assign(self.parameters, self.ema)
        _assign(self._weights(), self.best)
        self.model.eval()
        chosen = progress.best_step if self.config.select is not None else progress.step
        metrics = next((entry for entry in progress.history if entry["step"] == chosen), {})
        best = {name: value for name, value in metrics.items() if name not in ("step", "epoch", "train_loss")}
        return TrainResult(progress.step, chosen, best, progress.history, progress.seconds, progress.stopped)

    def _signal(self, signals: _Signals) -> int:
        """Return the signal that waits, or 0: the same in every process, or some would wait for the others for ever."""
        if self.accelerator.num_processes == 1:
            return signals.waiting
        if self.progress.step % 10:
            return 0
        return int(self.accelerator.gather(torch.tensor([signals.waiting], device=self.accelerator.device)).max())

    def _start_epoch(self) -> None:
        """At the start of an epoch, let the plateau read the metric of the epoch before (official code)."""
        config, schedule, progress = self.config, self.config.schedule, self.progress
        epoch, inside = divmod(progress.step, config.epoch_steps)
        if inside or not epoch or not isinstance(schedule, (WarmupPlateau, Plateau)):
            return
        if isinstance(schedule, WarmupPlateau) and epoch < schedule.warmup_epochs:
            return
        progress.plateau.update(progress.history[-1][config.select or ""], schedule, config.select_mode)
        if config.optimiser.lr * progress.plateau.factor < schedule.min_lr:
            progress.stopped = f"the learning rate fell below {schedule.min_lr:g}"

    def _optimiser_step(self, batches: _Batches) -> float:
        """Run one optimiser step and return its learning rate."""
        config, step, accelerator = self.config, self.progress.step, self.accelerator
        scaler = accelerator.scaler
        factor = learning_rate_factor(
            config.schedule, step, config.total_steps, config.epoch_steps, self.progress.plateau.factor
        )
        for group, rate in zip(self.optimiser.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        losses: list[Tensor] = []
        metrics: list[Mapping[str, float | Tensor]] = []
        together = accelerator.num_processes
        for micro in range(config.accumulate):
            index = (step * config.accumulate + micro) * together + accelerator.process_index
            drawn = batches.take(index)
            self._seed("batch", index)
            with nullcontext() if micro == config.accumulate - 1 else accelerator.no_sync(self.forward):
                loss, others = self.forward(drawn)
                part = loss / config.accumulate
                torch.autograd.backward(part if scaler is None else scaler.scale(part))
            losses.append(loss.detach())
            metrics.append({name: v.detach() if isinstance(v, Tensor) else v for name, v in others.items()})
        # Written out because accelerate's wrappers look for optional packages in every step, 0.2 ms each time.
        if scaler is not None:
            scaler.unscale_(self.optimiser)
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        if scaler is None:
            self.optimiser.step()
        else:
            scaler.step(self.optimiser)
            scaler.update()
        self.optimiser.zero_grad()
        mean = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        if together > 1:  # of the whole batch, whoever had which part of it
            mean = mean.float() / together
            torch.distributed.all_reduce(mean)
        self.pending.append((step, mean, metrics))
        if self.ema and config.ema is not None:
            weights = [value.data for value in self.parameters.values()]
            # Short at first, or the mean would hold on to the random initial weights.
            decay = min(config.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.ema.values()), weights, 1 - decay)
        return config.optimiser.lr * factor

    @property
    def micro_steps(self) -> range:
        """This process's micro-steps, over the whole training."""
        together = self.accelerator.num_processes
        total = self.config.total_steps * self.config.accumulate * together
        return range(self.accelerator.process_index, total, together)

    def generator_of(self, micro_step: int) -> torch.Generator:
        """Return the generator that draws a micro-step's batch."""
        return torch.Generator().manual_seed(int.from_bytes(self._digest("batch", micro_step)[:8], "little"))

    def _digest(self, purpose: str, index: int) -> bytes:
        return hashlib.blake2b(f"{self.config.seed} {purpose} {index}".encode()).digest()

    def _seed(self, purpose: str, index: int) -> None:
        """Seed torch's own generator, which dropout uses, for a micro-step or a validation."""
        digest = self._digest(purpose, index)
        # torch.manual_seed formats a stack trace for a GPU that is not in use, 0.3 ms each time.
        torch.default_generator.manual_seed(int.from_bytes(digest[8:16], "little"))
        if self.accelerator.device.type == "cuda":
            torch.cuda.manual_seed(int.from_bytes(digest[8:15], "little"))

    # -- watching

    def _take_losses(self) -> None:
        """Fetch the losses of the last steps from the device, all in one go, and stop if one is not finite."""
        if not self.pending:
            return
        values = torch.stack([loss.float() for _, loss, _ in self.pending]).tolist()
        for (step, _, metrics), value in zip(self.pending, values, strict=True):
            if not math.isfinite(value):
                raise RuntimeError(
                    f"{self.label}: the loss is {value} at step {step} of {self.config.total_steps}; try a lower "
                    f"learning rate (now {self.config.optimiser.lr:g}) or clipping, and look for NaN in the data"
                )
            self.progress.loss_sum += value
            self.progress.loss_count += 1
            self.since_log["loss"].append(value)
            for micro in metrics:
                for name, number in micro.items():
                    self.since_log[name].append(float(number))
        self.last_loss = values[-1]
        self.pending.clear()

    def _log_training(self, rate: float) -> None:
        step = self.progress.step
        if self.is_main:
            means = {f"{self.prefix}train/{name}": sum(v) / len(v) for name, v in self.since_log.items()}
            epoch = step / self.config.epoch_steps
            self.ctx.tracker.log({**means, f"{self.prefix}train/lr": rate, f"{self.prefix}epoch": epoch}, step)
        self.since_log.clear()

    def _validate(self, validate: Validate) -> None:
        """Validate the weights that would be kept, and keep them if they are the best."""
        config, progress, step = self.config, self.progress, self.progress.step
        self._seed("validate", step)
        self.model.eval()
        with self._averaged_weights():
            with torch.no_grad(), self.accelerator.autocast():
                metrics = [{name: float(value) for name, value in validate().items()}]
            if self.accelerator.num_processes > 1:
                broadcast_object_list(metrics)
            values = metrics[0]
            if config.select is not None:
                value = self._selected(values)
                if not progress.best_step or _better(value, self._best_value(), config.select_mode):
                    progress.best_step = step
                    self.best = _copies(self._weights(), device="cpu")
        self.model.train()
        train_loss = progress.loss_sum / max(progress.loss_count, 1)
        progress.loss_sum, progress.loss_count = 0.0, 0
        epoch = step / config.epoch_steps
        progress.history.append({"step": step, "epoch": epoch, "train_loss": train_loss, **values})
        if self.is_main:
            named = {f"{self.prefix}validation/{name}": value for name, value in values.items()}
            self.ctx.tracker.log({**named, f"{self.prefix}epoch": epoch}, step)

    def _selected(self, values: Mapping[str, float]) -> float:
        select = self.config.select or ""
        if select not in values:
            raise ValueError(
                f"{self.label}: validation returned {sorted(values)}, not '{select}' that selects the weights"
            )
        if math.isnan(values[select]):
            raise RuntimeError(f"{self.label}: the validation metric '{select}' is nan after step {self.progress.step}")
        return values[select]

    def _best_value(self) -> float:
        best = next(entry for entry in self.progress.history if entry["step"] == self.progress.best_step)
        return best[self.config.select or ""]

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Put the running mean of the weights, if there is one, in the place of the weights."""
        if not self.ema:
            yield
            return
        current = _copies(self.parameters)
        _assign(self.parameters, self.ema)
        try:
            yield
        finally:
            _assign(self.parameters, current)

    # -- checkpoints

    def _weights(self) -> dict[str, Tensor]:
        """Return all that training changes: trained parameters, and buffers such as batch norm's statistics."""
        saved = self.model.state_dict().keys()
        return {**self.parameters, **{name: value for name, value in self.model.named_buffers() if name in saved}}

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must share with this run to be of use to it: not how many processes train."""
        shapes = {name: list(value.shape) for name, value in self._weights().items()}
        config = self.config.model_dump(mode="json")
        return {"config": {**config, "accumulate": self.config.accumulate * processes()}, "shapes": shapes}

    def _save(self) -> None:
        if not self.is_main:
            return
        tensors = {f"model/{name}": value for name, value in self._weights().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"optimiser/{key}/{name}"] = value
        scaler = self.accelerator.scaler
        state = {
            "identity": self._identity(),
            "progress": asdict(self.progress),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        checkpoint.save(self.folder, tensors, state)

    def resume(self) -> None:
        """Go on from the newest usable checkpoint, if there is one; however many processes wrote it."""
        self._take_up()
        if self.accelerator.num_processes > 1:
            step = torch.tensor([self.progress.step], device=self.accelerator.device)
            steps = sorted(set(self.accelerator.gather(step).tolist()))
            if len(steps) > 1:  # on a shared file system one may see the newest checkpoint later than another
                raise RuntimeError(
                    f"{self.label}: the processes read checkpoints of different steps ({', '.join(map(str, steps))}) "
                    f"in {self.folder}; start it again"
                )

    def _take_up(self) -> None:
        found = checkpoint.load(self.folder)
        if found is None:
            return
        tensors, state = found
        if state["identity"] != self._identity():
            logger.warning(
                "%s: the checkpoint in %s is of another configuration: starting anew", self.label, self.folder
            )
            return
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "ema": {}, "optimiser": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        _assign(self._weights(), parts["model"])
        _assign(self.ema, parts["ema"])
        self.best = parts["best"]
        for name, tensor in parts["optimiser"].items():
            key, _, parameter_name = name.partition("/")
            parameter = self.parameters[parameter_name]
            like = torch.empty_like(parameter) if tensor.shape == parameter.shape else torch.empty_like(tensor)
            self.optimiser.state[parameter][key] = like.to(parameter.device, tensor.dtype).copy_(tensor)
        progress = dict(state["progress"])
        self.progress = _Progress(**{**progress, "plateau": PlateauState(**progress["plateau"])})
        self.finished_before = bool(self.progress.stopped)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def _accelerator(config: TrainingConfig, device: str) -> Accelerator:
    # accelerate keeps device and precision for the life of the process; stages of one process may differ in both.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        # A batch need not touch every parameter: one subject's images use one subject's voxel embeddings.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _optimiser_groups(
    parameters: Mapping[str, nn.Parameter],
    named: Mapping[str, Iterable[nn.Parameter]],
    config: TrainingConfig,
    label: str,
) -> list[dict[str, Any]]:
    """Return torch's parameter groups: the named ones that have settings of their own, then the rest."""
    settings = config.optimiser
    if missing := sorted(settings.groups.keys() - named.keys()):
        raise ValueError(f"{label}: optimiser settings for groups {missing}, but the groups here are {sorted(named)}")
    decay = settings.weight_decay if settings.weight_decay is not None else 0.01 if settings.name == "adamw" else 0.0
    groups = []
    left = {id(parameter): parameter for parameter in parameters.values()}
    for name, own in settings.groups.items():
        members = [left.pop(id(parameter)) for parameter in named[name] if id(parameter) in left]
        if members:
            own_decay = own.weight_decay if own.weight_decay is not None else decay
            groups.append({"params": members, "lr": own.lr or settings.lr, "weight_decay": own_decay})
    if left:
        groups.append({"params": list(left.values()), "lr": settings.lr, "weight_decay": decay})
    return groups


def _optimiser(groups: list[dict[str, Any]], config: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    settings = config.optimiser
    # The fused form is one kernel a step: three times as fast as the default on a CPU.
    options: dict[str, Any] = {"betas": settings.betas, "eps": settings.eps, "fused": device.type in ("cpu", "cuda")}
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, **options)
    return torch.optim.Adam(groups, amsgrad=True, **options)


def _copies(tensors: Mapping[str, Tensor], device: str | None = None) -> dict[str, Tensor]:
    return {name: value.detach().to(device or value.device, copy=True) for name, value in tensors.items()}


def _assign(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write ``values`` into the tensors of the same names."""
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)


def _better(value: float, than: float, mode: str) -> bool:
    return value < than if mode == "min" else value > than


# ---------------------------------------------------------------------------------------------------------------------
# Signals and global state


class _Signals:
    """Lets the first signal wait until a checkpoint is written, then hands it to whoever handled it before.

    So Ctrl-C ends in KeyboardInterrupt as ever, the harness or submitit end or requeue the job in their own way, and a
    handler that ignores its signal does not end the training. A second signal is handed on at once.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.waiting = 0
        self._outer: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in self.NUMBERS:
                handler = signal.getsignal(number)
                if callable(handler) or (number == signal.SIGTERM and handler == signal.SIG_DFL):
                    self._outer[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._outer.items():
            signal.signal(number, handler)
        if self.waiting and kind is None:  # it came with the last step
            self.hand_on(self.waiting)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.waiting:
            self.hand_on(number, frame)
        self.waiting = number

    def hand_on(self, number: int, frame: FrameType | None = None) -> None:
        """Do what would have been done about the signal without us."""
        self.waiting = 0
        handler = self._outer.get(number)
        if not callable(handler):
            raise KeyboardInterrupt(f"signal {number}")
        handler(number, frame)


class _NoBars:
    """Shows nothing: only the first process has a bar."""

    def bar(self, title: str, total: int, start: int, /) -> AbstractContextManager[_NoBars]:
        return nullcontext(self)

    def advance(self, steps: int, text: str, /) -> None:
        pass


def _keep_random_state(device: str) -> AbstractContextManager[None]:
    """Leave torch's global generators as they were."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.startswith("cuda") else [])


@contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """Choose GPU kernels that give the same bits each time, where there are any; CPU kernels do so anyway."""
    if not device.startswith("cuda"):
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
