"""Settings of the training loop: optimiser, schedule, length, selection. Light to import; ``training`` has the loop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GroupConfig(_Settings):
    """What a named group of parameters does differently from the rest."""

    lr: PositiveFloat | None = Field(default=None, description="Learning rate of the group; None: as the rest.")
    weight_decay: float | None = Field(default=None, ge=0, description="Weight decay of the group; None: as the rest.")


class OptimiserConfig(_Settings):
    """Optimiser and its learning rates; a schedule multiplies the rates of all groups by the same factor."""

    name: Literal["adamw", "adam-amsgrad"] = Field(
        default="adamw",
        description="adamw: the BITs and the joint stage (Brain-IT, training details); adam-amsgrad: the encoder "
        "(official code).",
    )
    lr: PositiveFloat = Field(
        default=5e-4,
        description="Peak learning rate: 5e-4 for both BITs, 1e-5 for the joint stage, 1e-3 for the encoder.",
    )
    weight_decay: float | None = Field(
        default=None,
        ge=0,
        description="None: what the optimiser does by itself, 0.01 for adamw and 0 for adam-amsgrad.",
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="Decay of the moments (torch's default).")
    eps: PositiveFloat = Field(default=1e-8, description="Added to the denominator (torch's default).")
    groups: dict[str, GroupConfig] = Field(
        default={},
        description="Own settings of named parameter groups, such as a larger rate and no decay for voxel embeddings, "
        "each of which sees few of the batches.",
    )


class OneCycle(_Settings):
    """Per step: cosine from lr/start_div up to lr, then cosine down to about nothing (torch's OneCycleLR)."""

    kind: Literal["one-cycle"] = "one-cycle"
    warmup: float = Field(default=0.1, ge=0, lt=1, description="Fraction of the steps spent on the way up.")
    start_div: PositiveFloat = Field(default=25.0, description="The first rate is lr / start_div.")
    final_div: PositiveFloat = Field(default=1e4, description="The last rate is lr / start_div / final_div.")


class WarmupPlateau(_Settings):
    """Per epoch: polynomial warm-up, then lower where the selection metric stalls (both BITs, official code)."""

    kind: Literal["warmup-plateau"] = "warmup-plateau"
    warmup_epochs: PositiveInt = Field(
        default=15, description="Epoch e runs at lr * (start + (1 - start) * (e / epochs)^3)."
    )
    start: float = Field(default=1e-3, ge=0, le=1, description="Fraction of lr in the first epoch.")
    factor: float = Field(default=0.1, gt=0, lt=1, description="What a plateau multiplies the rate by.")
    patience: int = Field(default=5, ge=0, description="Epochs without progress that are let pass.")
    threshold: float = Field(default=1e-3, ge=0, description="Absolute change of the metric that counts as progress.")
    min_lr: float = Field(default=1e-7, ge=0, description="Training ends when the rate falls below.")


class Plateau(_Settings):
    """Per epoch: lower where the selection metric stalls (encoder, official code: the metric is maximised)."""

    kind: Literal["plateau-max"] = "plateau-max"
    factor: float = Field(default=0.1, gt=0, lt=1, description="What a plateau multiplies the rate by.")
    patience: int = Field(default=4, ge=0, description="Epochs without progress that are let pass.")
    threshold: float = Field(default=3e-3, ge=0, description="Absolute change of the metric that counts as progress.")
    min_lr: float = Field(default=1e-7, ge=0, description="Training ends when the rate falls below.")


class LinearWarmup(_Settings):
    """Per step: linear warm-up, then constant (joint stage, official code)."""

    kind: Literal["linear-warmup"] = "linear-warmup"
    warmup_steps: PositiveInt = Field(default=1000, description="Optimiser steps of the warm-up.")
    start: float = Field(default=1e-6, ge=0, le=1, description="Fraction of lr in the first step.")


class Constant(_Settings):
    """The same rate throughout."""

    kind: Literal["constant"] = "constant"


Schedule = Annotated[OneCycle | WarmupPlateau | Plateau | LinearWarmup | Constant, Field(discriminator="kind")]


class TrainingConfig(_Settings):
    """Everything about one training that changes its result; the batch and the loss are the caller's."""

    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: Schedule = Constant()
    steps: PositiveInt | None = Field(default=None, description="Optimiser steps; give these or the epochs.")
    epochs: PositiveInt | None = Field(
        default=None, description="Epochs; 30 for the encoder, 60 for the BITs, 10 for the joint stage (paper)."
    )
    steps_per_epoch: PositiveInt | None = Field(
        default=None, description="Optimiser steps that make an epoch; None: all steps are one epoch."
    )
    accumulate: PositiveInt = Field(
        default=1, description="Micro-batches whose gradients are averaged in one optimiser step."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Arithmetic of the forward pass: fp16 with a gradient scaler in the official code."
    )
    clip: PositiveFloat | None = Field(
        default=None, description="Largest norm of the gradient; the official code has no limit."
    )
    validate_every: PositiveInt | None = Field(
        default=None,
        description="Optimiser steps between validations; None: once an epoch. The last step always validates.",
    )
    select: str | None = Field(
        default=None,
        description="Validation metric whose best weights are kept (validation images only); None: the last weights.",
    )
    select_mode: Literal["min", "max"] = Field(default="min", description="Whether lower or higher is better.")
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of a running mean of the weights, which is then validated and kept.",
    )
    seed: int = Field(default=0, ge=0, description="Seeds batches, dropout and validation.")

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.steps if self.steps is not None else (self.epochs or 0) * (self.steps_per_epoch or 0)

    @property
    def epoch_steps(self) -> int:
        """Optimiser steps of an epoch."""
        return self.steps_per_epoch or self.total_steps

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.epochs is not None and self.steps_per_epoch is None:
            raise ValueError("epochs need steps_per_epoch")
        if isinstance(self.schedule, (WarmupPlateau, Plateau)):
            if self.select is None:
                raise ValueError(f"schedule {self.schedule.kind} follows a validation metric: name it in select")
            if self.validate_every not in (None, self.epoch_steps):
                raise ValueError(
                    f"schedule {self.schedule.kind} needs one validation an epoch: leave out validate_every"
                )
        if isinstance(self.schedule, Plateau) and self.select_mode != "max":
            raise ValueError("schedule plateau-max maximises its metric: set select_mode to max")
        return self
