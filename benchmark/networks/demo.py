"""The networks of the ``demo`` preset, which install with pip, each in one role only.

EfficientNet-Lite0 gives the *targets* (low-level features, semantic tokens, the encoder's backbone); EfficientNet-Lite2
and AugNet's ResNet-50 are the *judges*. SqueezeNet, which drives the simulated brain, lives in
``benchmark.data.squeezenet``. Every file is checked against its SHA-256 before it is read (``benchmark.weights``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.errors import UserError
from benchmark.networks.features import FeatureNetwork
from benchmark.weights import weights_digest, weights_file
from methods.brain_it.encoder import TappedBackbone
from methods.brain_it.generate import Generator


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fold the inference-time batch norm ``norm`` into ``conv``: one pass less over every map."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    conv.weight.data = conv.weight.data * scale.data[:, None, None, None]
    conv.bias = nn.Parameter(shift.data)


class EfficientNetLite(FeatureNetwork):
    """EfficientNet-Lite, ImageNet weights. Layers: ``block0`` .. ``block6`` (maps) and ``pooled`` (B x 1280)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import timm

        self.name, self.digest = name, weights_digest(name)
        net = timm.create_model(f"tf_efficientnet_{name}")
        source = torch.load(weights_file(name), weights_only=True, map_location="cpu")
        target = net.state_dict()  # the tensors map one to one, in order
        if [v.shape for v in source.values()] != [v.shape for v in target.values()]:
            raise UserError(f"the weights of {name} do not fit timm's tf_efficientnet_{name}; type: make install")
        net.load_state_dict(dict(zip(target, source.values(), strict=True)))
        net.eval()
        for module in net.modules():
            for conv, norm in (
                ("conv_stem", "bn1"),
                ("conv_dw", None),
                ("conv_pw", None),
                ("conv_pwl", "bn3"),
                ("conv_head", "bn2"),
            ):
                if not isinstance(getattr(module, conv, None), nn.Conv2d):
                    continue
                if norm is None:  # depthwise-separable blocks run dw, pw; inverted residuals run pw, dw, pwl
                    first = "conv_pw" if hasattr(module, "conv_pwl") else "conv_dw"
                    norm = "bn1" if conv == first else "bn2"
                layer = getattr(module, norm)
                _fold(getattr(module, conv), layer)
                setattr(module, norm, nn.Sequential(layer.drop, layer.act))
        self.net = net
        self.freeze()

    @staticmethod
    def normalised(images: Tensor) -> Tensor:
        """Return (pixel - 127) / 128 with pixels of 0..255, which the weights were trained on."""
        return ((images * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the named layers of ``images`` (B x 3 x H x W, float in [0, 1])."""
        found: dict[str, Tensor] = {}
        x = self.net.bn1(self.net.conv_stem(self.normalised(images)))
        last = "pooled" if "pooled" in layers else max(layers)
        for i, block in enumerate(self.net.blocks):
            x = block(x)
            if f"block{i}" in layers:
                found[f"block{i}"] = x
            if f"block{i}" == last:
                break
        if "pooled" in layers:
            found["pooled"] = self.net.bn2(self.net.conv_head(x)).mean((2, 3))
        return {layer: found[layer] for layer in layers}


class ResNet50(FeatureNetwork):
    """AugNet's self-supervised ResNet-50. Layers: ``layer1`` .. ``layer4`` (maps) and ``avgpool`` (B x 2048)."""

    mean: Tensor
    std: Tensor
    _MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, name: str = "augnet") -> None:
        super().__init__()
        from torchvision.models import resnet50

        self.name, self.digest = name, weights_digest(name)
        net = resnet50(weights=None)
        source = torch.load(weights_file(name), weights_only=True, map_location="cpu")
        own = {
            k.removeprefix("module.pre."): v
            for k, v in source.items()
            if k.startswith("module.pre.") and ".fc." not in k
        }
        missing, _ = net.load_state_dict(own, strict=False)
        if any(not key.startswith("fc.") for key in missing):
            raise UserError(f"the weights of {name} do not fit torchvision's resnet50; type: make install")
        net.fc = nn.Identity()
        self.net = net
        self.register_buffer("mean", torch.tensor(self._MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(self._STD)[:, None, None], persistent=False)
        self.freeze()

    def features(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the named layers of ``images`` (B x 3 x H x W, float in [0, 1])."""
        net = self.net
        found: dict[str, Tensor] = {}
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for layer in ("layer1", "layer2", "layer3", "layer4"):
            if all(wanted < layer for wanted in layers if wanted != "avgpool") and "avgpool" not in layers:
                break
            x = getattr(net, layer)(x)
            if layer in layers:
                found[layer] = x
        if "avgpool" in layers:
            found["avgpool"] = x.mean((2, 3))
        return {layer: found[layer] for layer in layers}


def pip_network(name: str, weights: Path | None = None, random_seed: int | None = None) -> FeatureNetwork:
    """Return an installed network; it needs no folder of weights and is never drawn at random."""
    return ResNet50(name) if name == "augnet" else EfficientNetLite(name)


class SpatialTokens(nn.Module):
    """Semantic tokens of a CNN: its last map's places, as CLIP's patch tokens are a transformer's.

    Args:
        network: the frozen network.
        mean: of each channel, taken off (none where left out).
        std: of each channel, divided by.
        size: side to which images are enlarged: objects of a 64-pixel image are too small for the network.
        layer: which map.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: FeatureNetwork,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        size: int = 128,
        layer: str = "block6",
    ) -> None:
        super().__init__()
        self.network, self.size, self.layer = network, size, layer
        self.register_buffer("mean", mean if mean is not None else torch.zeros(()), persistent=False)
        self.register_buffer("std", std if std is not None else torch.ones(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return B x places x channels of ``images`` (B x 3 x H x W in [0, 1])."""
        pixels = F.interpolate(
            images, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=False
        )
        tokens = self.network.features(pixels, [self.layer])[self.layer].flatten(2).transpose(1, 2)
        return (tokens - self.mean) / self.std


class _Stem(nn.Module):
    """What comes before EfficientNet-Lite's first block: images (B x 3 x H x W in [0, 1]) -> maps."""

    def __init__(self, network: EfficientNetLite) -> None:
        super().__init__()
        self.conv, self.act = network.net.conv_stem, network.net.bn1

    def forward(self, images: Tensor) -> Tensor:
        """Normalise the images as the weights expect them, and apply the stem."""
        x: Tensor = self.act(self.conv(EfficientNetLite.normalised(images)))
        return x


def _out_channels(block: nn.Module) -> int:
    return [module for module in block.modules() if isinstance(module, nn.Conv2d)][-1].out_channels


def lite_backbone(name: str, taps: Sequence[int], adapter_rank: int, grid: int) -> TappedBackbone:
    """Return EfficientNet-Lite as the brain encoder's backbone: its blocks at ``taps``, on a ``grid x grid`` grid."""
    network = EfficientNetLite(name)
    channels = [_out_channels(block) for block in network.net.blocks]
    return TappedBackbone(_Stem(network), list(network.net.blocks), channels, taps, rank=adapter_rank, grid=grid)


def lite_tokens(name: str) -> SpatialTokens:
    """Return images (B x 3 x H x W in [0, 1]) -> semantic tokens, on the scale that the demo's generator takes."""
    from benchmark.demo_generator.model import DemoGenerator

    parts = DemoGenerator.load()
    return SpatialTokens(EfficientNetLite(name), parts.token_mean, parts.token_std)


def demo_generator(name: str, unet: Path | None = None) -> Generator:
    """Return the diffusion model that turns the demo's semantic tokens into images of 64 x 64 pixels."""
    from benchmark.demo_generator.model import IMAGE_SIZE, DemoGenerator

    parts = DemoGenerator.load()
    if unet is not None:
        parts.unet.load_state_dict(load_file(unet))
    return Generator(parts.vae, parts.unet, image_size=IMAGE_SIZE)


def demo_autoencoder(name: str) -> tuple[nn.Module, int]:
    """Return the autoencoder of the demo's generator, and the side of its images."""
    from benchmark.demo_generator.model import IMAGE_SIZE, DemoGenerator

    return DemoGenerator.load().vae, IMAGE_SIZE
