"""Ridge regression in a BIT's place: the class of Takagi & Nishimoto and of Brain-Diffuser.

It knows one subject and measured recordings alone, as published: a linear map cannot gain from recordings that a smooth
function of the image predicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from methods.predictors import Predictor, Subject, UnfitError

if TYPE_CHECKING:
    from torch import Tensor

FOLDS = 5  # of the cross-validation
VALUES = 16384  # of a layer's target values, drawn at random, that choose its penalty


class RidgeRegression(Predictor):
    """A linear map of each subject's voxels, with a penalty for each layer that cross-validation chooses.

    What is kept are the penalties: what else a ridge is follows from the recordings by one solve. Predictions are
    weighted sums of the training images' tokens, which are read as they are needed.
    """

    title: ClassVar[str] = "ridge"

    def fit(self, subjects: Iterable[Subject], seed: int) -> dict[str, Any]:
        """Choose each subject's penalties by cross-validation on its training images, one for each layer of tokens."""
        import torch

        from methods.baselines.ridge import Ridge

        alphas: dict[str, list[float]] = {}
        for subject in subjects:
            if len(subject) < FOLDS:
                found = f"subject {subject.number} has {len(subject)} training images"
                raise UnfitError(f"{found}; predictor ridge needs {FOLDS} or more")
            columns = drawn_columns(subject.layers, subject.width, seed)
            drawn: list[list[Tensor]] = [[] for _ in columns]
            for part in subject.parts():
                for k, layer in enumerate(subject.tokens(part).split(subject.layers, 1)):
                    drawn[k].append(layer.flatten(1)[:, columns[k].to(layer.device)])
            x = subject.betas
            alphas[str(subject.number)] = [Ridge(folds=FOLDS, seed=seed).fit(x, torch.cat(y)).alpha for y in drawn]
        return {"alphas": alphas}

    def predict(self, fitted: Mapping[str, Any], subject: Subject, betas: Tensor) -> Tensor:
        """Weigh the tokens of the subject's training images."""
        import torch

        from methods.baselines.ridge import image_weights

        alphas = fitted["alphas"][str(subject.number)]
        x = subject.betas
        weights = {alpha: image_weights(x, betas, alpha).float() for alpha in set(alphas)}
        out = torch.zeros(len(betas), sum(subject.layers), subject.width, device=betas.device)
        for part in subject.parts():
            true = subject.tokens(part).split(subject.layers, 1)
            added = [
                torch.einsum("mn,ntw->mtw", weights[alpha][:, part], layer)
                for alpha, layer in zip(alphas, true, strict=True)
            ]
            out += torch.cat(added, 1)
        return out


def drawn_columns(layers: tuple[int, ...], width: int, seed: int) -> list[Tensor]:
    """Draw the target values of each layer that choose its penalty."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(tokens * width, generator=generator)[:VALUES] for tokens in layers]
