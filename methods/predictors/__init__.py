"""What stands in a BIT's place: one file a method, found by its name.

``NAME.py`` in this folder defines one class, a :class:`Predictor` or a :class:`Network`, and that is all: ``NAME`` is
then a value of ``lowlevel.predictor`` and ``semantic.predictor``, the class's fields are settings (``semantic.NAME.k``)
that enter the fingerprint, and its title stands in the leaderboard. ``docs/extending.md`` goes through an example.

The files are read whenever a command line makes sense of settings, so what takes long to import, torch above all, is
imported inside the functions that need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor, nn

Branch = Literal["lowlevel", "semantic"]


class UnfitError(ValueError):
    """The data do not suffice for a method; the message says what it needs."""


class Subject(Protocol):
    """The training images of one subject, with what was recorded of them.

    Attributes:
        number: the subject's, as in NSD, from 1.
        layers: how many tokens of an image each layer of the branch's targets has; one number in the semantic branch.
        width: of a token.
    """

    number: int
    layers: tuple[int, ...]
    width: int

    def __len__(self) -> int:
        """Images n."""

    @property
    def betas(self) -> Tensor:
        """(n, voxels) z-scored activations, float32, on the device; read anew each time."""

    def tokens(self, images: slice | Sequence[int] | Tensor) -> Tensor:
        """Return the true tokens of these of the n images: (images, tokens, width), float32, on the device.

        All of them may be too many for memory: VGG's maps of one image are 15 MB of tokens.
        """

    def parts(self) -> Iterator[slice]:
        """Cut the n images into parts whose tokens fit into memory."""


class Method(BaseModel):
    """A method's settings, as fields with defaults, and what there is to know of it, as class variables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: ClassVar[str]
    """What the leaderboard calls it."""
    version: ClassVar[int] = 1
    """Of its code: raise it when results change, and they are computed again."""
    branches: ClassVar[tuple[Branch, ...]] = ("lowlevel", "semantic")
    """Whose tokens it can predict."""

    @classmethod
    def names(cls, name: str, branch: Branch) -> tuple[str, ...]:
        """Return the values of the setting ``predictor`` that mean the method of the file ``name``."""
        return (name,) if branch in cls.branches else ()


class Predictor(Method):
    """A method that fits itself to measured recordings: a regression, nearest neighbours."""

    def fit(self, subjects: Iterable[Subject], seed: int) -> Mapping[str, Any]:
        """Return what must be kept of the fit: name -> tensor, or plain numbers, lists and mappings of them.

        Args:
            subjects: all that are trained on; to go through them moves a progress bar.
            seed: the variant's.

        Raises:
            UnfitError: there are too few images, or what else the user can mend.
        """
        return {}

    def predict(self, fitted: Mapping[str, Any], subject: Subject, betas: Tensor) -> Tensor:
        """Return the tokens of other recordings of a subject: (m, tokens, width).

        Args:
            fitted: what :meth:`fit` returned, read again from the disk.
            subject: whose recordings they are.
            betas: (m, voxels), on the device.
        """
        raise NotImplementedError


class Network(Method):
    """A network that the harness trains as it trains a BIT: on the same batches, external images among them.

    In the low-level branch it goes by two names, ``NAME-infonce`` and ``NAME-mse``, for the two losses.
    """

    lr: PositiveFloat = Field(3e-4, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")

    @classmethod
    def names(cls, name: str, branch: Branch) -> tuple[str, ...]:
        """Return the values of the setting ``predictor`` that mean the network of the file ``name``."""
        if branch == "lowlevel" and branch in cls.branches:
            return f"{name}-infonce", f"{name}-mse"
        return super().names(name, branch)

    def build(self, n_voxels: Sequence[int], tokens: int, width: int) -> nn.Module:
        """Return the network, its weights drawn by torch's global generator.

        It is called as ``network(betas, subject, keep=None, queries=None)``, with (B, most voxels) activations, zeros
        after a subject's last voxel; (B,) positions of the subjects; (B, most voxels) bool, the voxels that take part
        (None: all); and (B, n) int64, the tokens to return (None: all). It returns (B, tokens or n, width).

        Args:
            n_voxels: voxels of each subject.
            tokens: tokens of an image.
            width: of a token.
        """
        raise NotImplementedError
