"""What is run: a ``Variant`` and its parts, as frozen models.

One variant is one row of the leaderboard. Every field's default is the paper's value (or the official code's, where the
paper is silent; the description says which); the ``demo`` preset is a set of other values for the same fields. A
setting is addressed by its dotted path, such as ``clustering.n_clusters``. Sections are those of "Brain-IT" (ICLR
2026). Light to import: no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal, NoReturn, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from benchmark.data.settings import SimulationSettings
from benchmark.errors import UserError, did_you_mean
from benchmark.predictors import method_name, methods
from benchmark.training_config import (
    Constant,
    GroupConfig,
    LinearWarmup,
    OneCycle,
    OptimiserConfig,
    Plateau,
    Schedule,
    TrainingConfig,
    WarmupPlateau,
)
from methods.predictors import Branch, Method


class Settings(BaseModel):
    """Base of all settings: frozen, and unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Settings):
    """Which images and which fMRI."""

    simulation: SimulationSettings | None = Field(
        None, description="Make a miniature NSD with these settings; None reads the tree that --data names."
    )
    image_size: PositiveInt = Field(
        256, description="Side of the images that are kept and reconstructed (official code)."
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="Of the training images (paper, App. D).")
    validation_seed: int = Field(
        0, ge=0, description="Seed of the validation split; the official split is unpublished."
    )
    external_images: int | None = Field(
        None, ge=0, description="Use at most so many external images; None uses all (Sec. 3.1)."
    )
    external_used: float = Field(
        1.0, ge=0, le=1, description="Fraction of them that the BITs train on, drawn at random (Table T1 has 0 and 1)."
    )


class NetworksConfig(Settings):
    """The frozen networks, by name (``benchmark.networks``)."""

    encoder: str = Field("dinov2-vitl14-reg4", description="Image backbone of the brain encoder (App. D).")
    lowlevel: str = Field("vgg16-bn", description="Whose feature maps are the low-level targets (Sec. 3.2).")
    semantic: str = Field("openclip-bigg14", description="Whose patch tokens are the semantic targets (Sec. 3.2).")
    generator: str = Field("sdxl-unclip", description="Diffusion model conditioned on the semantic tokens (Sec. 3.2).")
    refiner: str | None = Field(
        "zavychromaxl-v3", description="Diffusion model that refines the combined images (App. D.3); None: none."
    )

    def roles(self) -> dict[str, str]:
        """Return role -> network, those that are used."""
        return {role: name for role, name in self.model_dump().items() if name is not None}


class TargetsConfig(Settings):
    """What the frozen networks say of the images: kept on disk, or computed when a batch asks for it."""

    semantic: Literal["stored", "live"] = Field(
        "stored", description="CLIP tokens, float16: 62 GB for NSD, 105 GB for COCO (official code keeps them)."
    )
    lowlevel: Literal["stored", "live"] = Field(
        "live", description="Feature maps: VGG's would be 600 GB (official code computes them for each batch)."
    )
    external: Literal["stored", "live"] = Field(
        "stored", description="Predicted fMRI of the external images, float16: 78 GB; live runs the encoder instead."
    )
    clip_input: Literal["mindeye2", "standard"] = Field(
        "mindeye2",
        description="A CLIP tower sees (x + 1) / 2 of an image x in [0, 1], as MindEye2's and the official code, or x.",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Of a CLIP tower's weights.")
    batch: PositiveInt = Field(16, description="Images that pass the networks side by side; changes no result.")


class EncoderConfig(Settings):
    """The Universal Brain Encoder (Beliy et al. 2024; numbers from the official code)."""

    taps: tuple[PositiveInt, ...] = Field((1, 6, 12, 18, 24), description="Blocks whose outputs are read, from 1.")
    grid: PositiveInt = Field(16, description="Side of the grid of positions that voxels attend to.")
    input_size: PositiveInt = Field(224, description="Side of the images that the backbone sees.")
    embed_dim: PositiveInt = Field(256, description="Width of a voxel embedding.")
    inner: PositiveInt = Field(128, description="Width that each tap is projected to.")
    dropout: float = Field(0.25, ge=0, lt=1, description="Of the pooled features.")
    adapter_rank: int = Field(7, ge=0, description="Rank of the residual adapter after each block; 0: none.")
    voxels_per_example: PositiveInt = Field(5000, description="Sampled with replacement from the image's subject.")
    max_shift: int = Field(3, ge=0, description="Largest random shift of a training image, in pixels.")
    batch: PositiveInt = Field(32, description="Images in a step.")
    training: TrainingConfig = Field(
        TrainingConfig(
            optimiser=OptimiserConfig(name="adam-amsgrad", lr=1e-3),
            schedule=Plateau(),
            epochs=30,
            steps_per_epoch=1980,
            select="correlation",
            select_mode="max",
        ),
        description="Adam (amsgrad) 1e-3, 30 epochs, plateau on the 75th percentile of voxel correlations (official).",
    )


class ClusteringConfig(Settings):
    """The voxel-to-cluster mapping (Sec. 3.1, App. A.2 and A.3)."""

    method: Literal["functional", "coordinates", "schaefer-400", "schaefer-1000"] = Field(
        "functional",
        description="By the encoder's voxel embeddings; by place on fsaverage's pial surface; or an atlas's parcels "
        "(Table T2).",
    )
    n_clusters: PositiveInt = Field(
        128, description="Clusters shared by all subjects (Table T3 varies it); an atlas has as many as it has."
    )
    covariance: Literal["full", "tied", "diag", "spherical"] = Field("full", description="Of the mixture's components.")
    max_iter: PositiveInt = Field(100, description="Of expectation maximisation (scikit-learn's default).")


class BranchConfig(Settings):
    """One Brain Interaction Transformer and its training (Sec. 4, App. D), or what stands in its place.

    Each method that may (:mod:`benchmark.predictors`) has its settings under its name: ``mlp.hidden``.
    """

    branch: ClassVar[Branch]

    predictor: str = Field(
        "bit",
        description="What predicts the tokens: a BIT; a method of methods/predictors, such as a ridge regression of "
        "each subject; or nothing: the oracle knows the test images' own tokens. Only a BIT is trained jointly. "
        "NAME-infonce and NAME-mse are a network with either loss (Table T5).",
    )
    dim: PositiveInt = Field(512, description="Width of embeddings and tokens.")
    depth: PositiveInt = Field(5, description="Cross-transformer blocks after the first cross-attention.")
    heads: PositiveInt = Field(8, description="Attention heads.")
    voxels_per_example: PositiveInt | None = Field(15000, description="Sampled with replacement; None takes all.")
    batch: PositiveInt = Field(64, description="Examples in a step; their subjects are mixed.")
    external_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Of a batch; None: in proportion to their number, one pool of all samples (official code).",
    )
    embedding_init: Literal["random", "encoder"] = Field(
        "random",
        description="Voxel embeddings start at random (Sec. 4), or as a random projection of the encoder's: voxels of "
        "like tuning then start alike, whosever they are.",
    )
    embedding_std: PositiveFloat | None = Field(
        None, description="Deviation of the voxel embeddings at the start; None: 0.05 / sqrt(dim) (official code)."
    )
    training: TrainingConfig = Field(
        TrainingConfig(
            optimiser=OptimiserConfig(lr=5e-4),
            schedule=WarmupPlateau(),
            epochs=60,
            steps_per_epoch=2900,
            precision="fp16",
            select="loss",
        ),
        description="AdamW 5e-4, 60 epochs, 15 of them warm-up, then plateau on the validation loss.",
    )

    @classmethod
    def predictors(cls) -> tuple[str, ...]:
        """Return what ``predictor`` may be."""
        own = (name for file, method in methods().items() for name in method.names(file, cls.branch))
        return ("bit", *own, "oracle")

    @property
    def method(self) -> Method | None:
        """The method in the BIT's place, with its settings; None of a BIT and of an oracle."""
        method: Method | None = getattr(self, method_name(self.predictor), None)
        return method

    @field_validator("predictor")
    @classmethod
    def _known(cls, name: str) -> str:
        known = cls.predictors()
        if name not in known:
            raise ValueError(f"no predictor '{name}'{did_you_mean(name, known)}; there are {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is no multiple of heads {self.heads}")
        return self


_Branch = TypeVar("_Branch", bound=BranchConfig)


def _with_methods(**changed: Mapping[str, Any]) -> Callable[[type[_Branch]], type[_Branch]]:
    """Give a branch the settings of every method that can stand in it: a field for each, under its name.

    Args:
        changed: name of a method -> settings whose defaults are others in this branch.
    """

    def add(branch: type[_Branch]) -> type[_Branch]:
        fields: dict[str, Any] = {}
        for name, method in methods().items():
            if not method.names(name, branch.branch):
                continue
            if name in branch.model_fields or hasattr(branch, name):
                raise UserError(f"method {name}: a branch has a setting called so; give its file another name")
            fields[name] = (method, Field(method(**changed.get(name, {})), description=method.title))
        made: type[_Branch] = create_model(
            branch.__name__, __base__=branch, __module__=__name__, __doc__=branch.__doc__, **fields
        )
        return made

    return add


# MindEye's width would take 15 billion weights in the last layer: VGG's maps make 7190 tokens of 512.
@_with_methods(mlp={"hidden": 512})
class LowLevelConfig(BranchConfig):
    """The low-level branch: multi-layer feature tokens, InfoNCE (Sec. 3.2, App. D.1)."""

    branch = "lowlevel"

    width: PositiveInt = Field(512, description="Of a feature token; narrower ones are replicated.")
    input_size: PositiveInt = Field(112, description="Side of the images that the feature network sees.")
    layers: tuple[str, ...] = Field(("5", "12", "22", "32", "42"), description="Names of the tapped maps.")
    windows: tuple[tuple[int, int], ...] = Field(
        ((2, 2), (2, 1), (1, 1), (1, 1), (1, 1)), description="Window and stride of the merging, for each layer."
    )
    sampled: tuple[int, ...] = Field(
        (512, 512, 128, 64, 16), description="Positions drawn per example and layer in training."
    )
    standardise: bool = Field(False, description="Bring each channel to mean 0, deviation 1 over the training images.")
    centre: bool = Field(
        False,
        description="Take off each place's mean over the training images: else InfoNCE's easiest negatives, other "
        "places of the same picture, are told apart by place alone.",
    )
    scale: PositiveFloat = Field(1.0, description="Of the InfoNCE logits (official code: 1, no normalisation).")

    @model_validator(mode="after")
    def _one_of_each_a_layer(self) -> Self:
        if not len(self.layers) == len(self.windows) == len(self.sampled):
            raise ValueError(
                f"{len(self.layers)} layers, {len(self.windows)} windows, {len(self.sampled)} sampled; "
                "expected as many of each"
            )
        return self


@_with_methods()
class SemanticConfig(BranchConfig):
    """The semantic branch, stage 1: spatial tokens, mean squared error (Sec. 3.2)."""

    branch = "semantic"

    batch: PositiveInt = Field(128, description="Examples in a step.")


class JointConfig(Settings):
    """The semantic branch, stage 2: BIT and the diffusion model together (Sec. 3.2)."""

    enabled: bool = Field(True, description="Without, the tokens of stage 1 condition the generator as it was made.")
    batch: PositiveInt = Field(16, description="Examples in a micro-batch.")
    offset_noise: float = Field(
        0.04, ge=0, description="Deviation of the per-channel offset of the noise (official code)."
    )
    external_fraction: float | None = Field(None, ge=0, lt=1, description="As in the branches.")
    training: TrainingConfig = Field(
        TrainingConfig(
            optimiser=OptimiserConfig(lr=1e-5),
            schedule=LinearWarmup(),
            epochs=10,
            steps_per_epoch=2900,
            accumulate=4,
            precision="fp16",
            select="loss",
        ),
        description="AdamW 1e-5 over the UNet and BIT, warm-up over 1000 steps, 10 epochs.",
    )


class DipConfig(Settings):
    """Inversion of the predicted feature maps by a deep image prior (Sec. 3.2, App. D.2)."""

    size: PositiveInt = Field(224, description="Side of the image that is optimised (official code).")
    steps: PositiveInt = Field(2000, description="Optimisation steps (paper; the official code takes 1800).")
    lr: PositiveFloat = Field(1e-3, description="Of Adam (official code).")
    channels: PositiveInt = Field(128, description="Of the hourglass network.")
    skip: PositiveInt = Field(2, description="Skip channels (official code).")
    depth: PositiveInt = Field(32, description="Channels of its input.")
    input_noise: float = Field(1 / 30, ge=0, description="Deviation of the noise added to the input at each step.")
    ema: float = Field(0.99, ge=0, lt=1, description="Decay of the running mean of outputs that is returned.")
    calibrate: bool = Field(
        False,
        description="Map each layer's predictions linearly to the true tokens of validation images first: InfoNCE "
        "shapes them for telling tokens apart, not for a squared error. The paper inverts them as they are.",
    )
    gain: PositiveFloat = Field(
        1.0, description="Factor on the (calibrated) predictions; they shrink towards the mean."
    )
    batch: PositiveInt = Field(16, description="Images inverted side by side; changes no result.")


class GenerationConfig(Settings):
    """Dual-branch generation (Sec. 3.2, App. D.3)."""

    steps: PositiveInt = Field(38, description="Of the Euler sampler, from pure noise to image.")
    start_step: int = Field(14, ge=0, description="Where the noised low-level image enters.")
    guidance: float = Field(5.0, ge=0, description="Scale of classifier-free guidance against noise tokens.")
    offset_noise: float = Field(
        0.04, ge=0, description="Deviation of the per-channel offset of the noise (official code)."
    )
    contrast: float = Field(0.8, gt=0, le=1, description="Factor on the output's contrast (official code).")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp16", description="In which the denoiser computes while sampling (official code: fp16 autocast)."
    )
    saved_size: PositiveInt | None = Field(
        224, description="Side of the images that are saved (official code); None keeps the generator's."
    )
    subjects: tuple[int, ...] = Field(
        (1, 2, 5, 7), min_length=1, description="Whose recordings are reconstructed (Table 1)."
    )
    test_set: Literal["nsd", "nsd-synthetic"] = Field(
        "nsd", description="The shared images of NSD, or the 284 images of NSD-Synthetic, without scores (Fig. S14)."
    )
    test_images: PositiveInt | None = Field(None, description="Reconstruct only the first so many; None takes all.")
    batch: PositiveInt = Field(32, description="Images sampled side by side; changes no result.")

    @model_validator(mode="after")
    def _starts_before_the_end(self) -> Self:
        if self.start_step >= self.steps:
            raise ValueError(f"start_step {self.start_step}; expected less than steps, which is {self.steps}")
        return self


class RefinementConfig(Settings):
    """Refinement of the combined images by SDXL (App. D.3; numbers from the official code)."""

    size: PositiveInt = Field(768, description="Side at which the refiner works.")
    steps: PositiveInt = Field(25, description="Of its sampler, from pure noise to image.")
    start_step: int = Field(17, ge=0, description="Where the image enters: eight steps are left.")
    guidance: float = Field(5.0, ge=0, description="Scale of classifier-free guidance against the negative prompt.")
    batch: PositiveInt = Field(4, description="Images refined side by side; changes no result.")
    also_semantic: bool = Field(False, description="Refine the images of the semantic branch alone, too.")


class MemoryConfig(Settings):
    """How to fit into less memory. Changes no result beyond rounding, so it does not enter fingerprints."""

    checkpointing: bool = Field(
        True, description="Compute activations again in the backward pass, of the denoiser and the encoder's backbone."
    )
    offload: bool = Field(False, description="Keep the denoisers on the CPU while sampling, and bring parts as needed.")
    compile: bool = Field(False, description="Compile the denoisers for sampling.")


class ScoreConfig(Settings):
    """How reconstructions are scored."""

    protocol: str = Field("brain-it", description="Name of the protocol (python -m metrics protocols).")
    images: Literal["combined", "lowlevel", "semantic", "unrefined", "semantic-refined"] = Field(
        "combined",
        description="Which images stand for the variant: those of both branches (refined, where there is a refiner), "
        "of one branch alone (Table T4), the combined ones before refinement, or the semantic ones after it.",
    )
    random_weights: int | None = Field(
        None, ge=0, description="Draw the judges' weights from this seed: scores mean nothing then (smoke runs)."
    )


class TableConfig(Settings):
    """Training of a new subject's voxel table in a frozen model; its last weights are kept."""

    batch: PositiveInt = Field(description="Examples in a step.")
    epochs: PositiveInt = Field(
        description="An epoch of a BIT is transfer.real_every times as many samples as there are recordings; of the "
        "encoder it is the recordings."
    )
    accumulate: PositiveInt = Field(1, description="Batches whose gradients are averaged in one step.")
    optimiser: OptimiserConfig = Field(OptimiserConfig(), description="Of the table.")
    schedule: Schedule = Field(Constant(), description="No warm-up and no plateau (official code).")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp16", description="Arithmetic of the forward pass.")
    clip: PositiveFloat | None = Field(None, description="Largest norm of the gradient; None: no limit.")

    def training(self, samples: int, seed: int) -> TrainingConfig:
        """Return the training on epochs of so many samples."""
        steps = -(-samples * self.epochs // (self.batch * self.accumulate))
        return TrainingConfig(
            optimiser=self.optimiser,
            schedule=self.schedule,
            steps=steps,
            steps_per_epoch=-(-steps // self.epochs),
            accumulate=self.accumulate,
            precision=self.precision,
            clip=self.clip,
            seed=seed,
        )


def _adam(lr: float) -> OptimiserConfig:
    return OptimiserConfig(name="adam-amsgrad", lr=lr)


class TransferConfig(Settings):
    """Transfer to a new subject: base models of all others, and a voxel table of its own (Sec. 4.3, App. D.4)."""

    subject: PositiveInt | None = Field(
        None, description="Whom the base models never see and whose images are reconstructed; None: no transfer."
    )
    amount: Literal["full", "1h", "30min", "15min", "450"] = Field(
        "1h",
        description="What was recorded of it: the first 750, 375, 188 or 450 single trials of session 1 (how the paper "
        "took its 15 minutes is unpublished; its text says 450 samples), in proportion where sessions are shorter, "
        "shared images then removed; or, full, the averages of all its sessions.",
    )
    real_every: PositiveInt = Field(
        4, description="One sample in so many is a recording, the others are predicted (official code)."
    )
    encoder: TableConfig = Field(
        TableConfig(batch=32, epochs=30, optimiser=_adam(1e-3), precision="fp32"),
        description="Adam (amsgrad) 1e-3, 30 epochs, the last one kept (official code).",
    )
    lowlevel: TableConfig = Field(
        TableConfig(batch=64, epochs=50, optimiser=OptimiserConfig(lr=5e-4)),
        description="AdamW 5e-4, 50 epochs (official code).",
    )
    semantic: TableConfig = Field(
        TableConfig(batch=128, epochs=50, optimiser=OptimiserConfig(lr=5e-4)),
        description="AdamW 5e-4, 50 epochs (official code).",
    )
    joint: TableConfig = Field(
        TableConfig(batch=16, accumulate=4, epochs=200, optimiser=OptimiserConfig(lr=1e-5)),
        description="AdamW 1e-5, 200 epochs, the denoiser frozen too (official code).",
    )

    @field_validator("amount", mode="before")
    @classmethod
    def _number_or_name(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Variant(Settings):
    """One row: what is trained, on what, and how it is scored."""

    track: str = Field("paper", description="Results of different tracks are never ranked together.")
    seed: int = Field(0, ge=0, description="Seed of every network, batch, and sample.")
    data: DataConfig = DataConfig()
    networks: NetworksConfig = NetworksConfig()
    targets: TargetsConfig = TargetsConfig()
    encoder: EncoderConfig = EncoderConfig()
    clustering: ClusteringConfig = ClusteringConfig()
    lowlevel: LowLevelConfig = LowLevelConfig()
    semantic: SemanticConfig = SemanticConfig()
    joint: JointConfig = JointConfig()
    dip: DipConfig = DipConfig()
    generation: GenerationConfig = GenerationConfig()
    refinement: RefinementConfig = RefinementConfig()
    memory: MemoryConfig = MemoryConfig()
    score: ScoreConfig = ScoreConfig()
    transfer: TransferConfig = TransferConfig()

    @property
    def trains_jointly(self) -> bool:
        """Whether the denoiser is trained with what predicts its tokens."""
        return self.joint.enabled and self.semantic.predictor == "bit"

    @property
    def lacks(self) -> str | None:
        """A network that the variant cannot do without and does not name; None where it has all."""
        refined = self.score.images in ("unrefined", "semantic-refined")
        return "a refiner (networks.refiner)" if refined and self.networks.refiner is None else None

    @property
    def needs_anatomy(self) -> bool:
        """Whether voxels are clustered by where they are."""
        return self.clustering.method != "functional"

    @model_validator(mode="after")
    def _scores_what_is_made(self) -> Self:
        if self.score.images == "semantic-refined" and not self.refinement.also_semantic:
            raise ValueError("score.images 'semantic-refined' needs refinement.also_semantic")
        return self

    @model_validator(mode="after")
    def _a_transfer_is_whole(self) -> Self:
        new = self.transfer.subject
        if new is None:
            return self
        if self.lowlevel.predictor != "bit" or not self.trains_jointly:
            raise ValueError("transfer.subject needs BITs in both branches, and joint training")
        if self.generation.test_set != "nsd":
            raise ValueError("transfer.subject needs generation.test_set 'nsd'")
        # Whatever a preset reconstructs otherwise, a transfer is about the new subject.
        object.__setattr__(self, "generation", self.generation.model_copy(update={"subjects": (new,)}))
        return self

    @model_validator(mode="after")
    def _statistics_need_stored_maps(self) -> Self:
        if self.targets.lowlevel == "live" and (self.lowlevel.standardise or self.lowlevel.centre):
            raise ValueError("lowlevel.standardise and lowlevel.centre need targets.lowlevel 'stored'")
        return self

    def with_settings(self, settings: Mapping[str, Any]) -> Variant:
        """Return this variant with the dotted ``settings`` changed.

        Raises:
            UserError: a path that is no setting, or a value that it does not take.
        """
        data = self.model_dump()
        for path, value in settings.items():
            place: Any = data
            *parents, last = path.split(".")
            for name in parents:
                place = (
                    place[name] if isinstance(place, dict) and name in place else _unknown_setting(path, name, place)
                )
            if not isinstance(place, dict) or last not in place:
                _unknown_setting(path, last, place)
            place[last] = asdict(value) if isinstance(value, SimulationSettings) else value
        try:
            return Variant.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            given = "" if isinstance(first["input"], dict) else f" (given {first['input']!r})"
            raise UserError(f"setting {where}: {first['msg'].removeprefix('Value error, ')}{given}") from error
        except UserError as error:  # the simulation's own checks speak of its command line
            raise UserError(str(error).replace("--", "data.simulation.")) from error


def _unknown_setting(path: str, name: str, place: Any) -> NoReturn:
    hint = did_you_mean(name, sorted(place)) if isinstance(place, dict) else ""
    raise UserError(f"unknown setting '{path}'{hint}")


def _one_cycle(
    steps: int,
    lr: float,
    validate_every: int,
    select: str,
    mode: Literal["min", "max"] = "min",
    voxel_lr: float | None = None,
) -> TrainingConfig:
    groups = {"voxels": GroupConfig(lr=voxel_lr, weight_decay=0.0)} if voxel_lr else {}
    return TrainingConfig(
        optimiser=OptimiserConfig(lr=lr, groups=groups),
        schedule=OneCycle(warmup=0.15),
        steps=steps,
        validate_every=validate_every,
        select=select,
        select_mode=mode,
        clip=1.0,
    )


def _table(batch: int, epochs: int, lr: float, name: Literal["adamw", "adam-amsgrad"] = "adamw") -> TableConfig:
    return TableConfig(
        batch=batch,
        epochs=epochs,
        optimiser=OptimiserConfig(name=name, lr=lr, weight_decay=0.0),
        schedule=OneCycle(warmup=0.15),
        precision="fp32",
        clip=1.0,
    )


def paper() -> Variant:
    """Return the ``paper`` preset: every field at its default."""
    return Variant()


def demo() -> Variant:
    """Return the ``demo`` preset: the same method, sized for two CPU cores.

    Voxel embeddings start at the encoder's, so that what one subject teaches serves all from the first step, and have a
    rate of their own; every step sees all voxels. All values were chosen on validation images.
    """
    bit: dict[str, Any] = {
        "mlp": {"hidden": 256, "blocks": 2, "dropout": 0.1, "lr": 3e-3},
        "depth": 1,
        "voxels_per_example": None,
        "batch": 32,
        "external_fraction": 0.125,
        "embedding_init": "encoder",
        "embedding_std": 0.3,
    }
    return Variant(
        track="demo",
        data=DataConfig(simulation=SimulationSettings(), image_size=64),
        networks=NetworksConfig(encoder="lite0", lowlevel="lite0", semantic="lite0", generator="demo", refiner=None),
        targets=TargetsConfig(lowlevel="stored", batch=64),
        encoder=EncoderConfig(
            taps=(1, 2, 3, 5, 7),
            grid=8,
            input_size=64,
            embed_dim=48,
            inner=24,
            dropout=0.1,
            adapter_rank=0,
            voxels_per_example=600,
            max_shift=0,
            training=_one_cycle(500, 5e-3, 125, "correlation", "max", voxel_lr=1e-2),
        ),
        clustering=ClusteringConfig(covariance="diag"),
        lowlevel=LowLevelConfig(
            **bit,
            dim=64,
            heads=4,
            width=112,
            input_size=64,
            layers=("block0", "block1", "block2", "block3", "block4"),
            sampled=(16, 16, 16, 16, 16),
            standardise=True,
            centre=True,
            training=_one_cycle(600, 6e-3, 200, "loss", voxel_lr=3e-3),
        ),
        semantic=SemanticConfig(**bit, dim=96, heads=6, training=_one_cycle(800, 6e-3, 200, "loss", voxel_lr=3e-3)),
        joint=JointConfig(training=_one_cycle(60, 3e-5, 60, "loss"), external_fraction=0.0),
        dip=DipConfig(
            size=64, steps=80, lr=1.5e-2, channels=12, skip=4, depth=16, ema=0.9, calibrate=True, gain=2.5, batch=24
        ),
        generation=GenerationConfig(
            steps=18,
            start_step=4,
            guidance=2.0,
            contrast=1.0,
            precision="fp32",
            saved_size=None,
            subjects=(1, 2),
            batch=48,
        ),
        memory=MemoryConfig(checkpointing=False),
        score=ScoreConfig(protocol="demo"),
        transfer=TransferConfig(
            encoder=_table(32, 30, 1e-2, name="adam-amsgrad"),
            lowlevel=_table(32, 10, 3e-3),
            semantic=_table(32, 10, 3e-3),
            joint=_table(16, 1, 3e-4),
        ),
    )


PRESETS = {"demo": demo, "paper": paper}

QUICK = {
    "data.simulation": SimulationSettings(subjects=4, unique=200, shared=16, voxels=600, external=300),
    "encoder.training.steps": 150,
    "encoder.training.validate_every": 75,
    "lowlevel.training.steps": 120,
    "lowlevel.training.validate_every": 60,
    "semantic.training.steps": 120,
    "semantic.training.validate_every": 60,
    "joint.training.steps": 12,
    "joint.training.validate_every": 12,
    "dip.steps": 60,
    "generation.subjects": (1, 2),
    "generation.test_images": 12,
}
"""What ``--quick`` changes in the demo preset: fewer images and steps, for a look and for tests."""

SMALLEST: dict[str, Any] = {
    "data.simulation.subjects": 2,
    "data.simulation.shared": 8,
    "data.simulation.unique": 16,
    "data.simulation.voxels": 80,
    "data.simulation.external": 6,
    "encoder.training.steps": 4,
    "encoder.training.validate_every": 2,
    "lowlevel.dim": 16,
    "lowlevel.depth": 1,
    "lowlevel.heads": 2,
    "lowlevel.batch": 8,
    "lowlevel.training.steps": 4,
    "lowlevel.training.validate_every": 2,
    "semantic.dim": 16,
    "semantic.depth": 1,
    "semantic.heads": 2,
    "semantic.batch": 8,
    "semantic.training.steps": 4,
    "semantic.training.validate_every": 2,
    "joint.batch": 4,
    "joint.training.steps": 2,
    "joint.training.validate_every": 1,
    "dip.channels": 4,
    "dip.steps": 2,
    "generation.steps": 3,
    "generation.start_step": 1,
    "generation.test_images": 4,
}
"""What the smallest run that is a run changes in ``--quick``: seconds, and images of nothing."""
