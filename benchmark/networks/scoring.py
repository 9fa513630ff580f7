"""The networks that judge images in published protocols, at the layers that the published code reads.

Sources: torchvision's AlexNet, Inception-v3 and EfficientNet-B1; ResNet-50 of facebookresearch/swav; CLIP ViT-L/14 of
openai/CLIP. Each takes RGB in [0, 1] at the size that the protocol says and takes out only the mean and deviation that
it was trained with. All compute in float32, on a GPU too: TF32 alone would move a feature by a thousandth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from benchmark.networks.features import FeatureNetwork
from benchmark.networks.files import load_weights
from benchmark.networks.seeded import seeded
from benchmark.weights import DOWNLOADS, weights_digest, weights_file

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ScoringNetwork(FeatureNetwork):
    """A frozen judge; its ``net`` has the names of the published weights, without the parts that no layer needs.

    Attributes:
        LAYERS: what :meth:`features` can return.
        UNUSED: beginnings of names in the published file that are not read.
        STATISTICS: mean and deviation of each channel, taken out of the images.
    """

    LAYERS: ClassVar[tuple[str, ...]] = ("avgpool",)
    UNUSED: ClassVar[tuple[str, ...]] = ()
    STATISTICS: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = IMAGENET
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, digest: str) -> None:
        super().__init__()
        self.name, self.digest = name, digest
        self.net = self.build()
        mean, std = (torch.tensor(values, device="cpu")[:, None, None] for values in self.STATISTICS)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @classmethod
    def loaded(cls, name: str, weights: Path | None = None, random_seed: int | None = None) -> Self:
        """Return the network, frozen, with the weights of its file, or with weights drawn from ``random_seed``.

        Args:
            name: of :data:`benchmark.weights.DOWNLOADS`.
            weights: folder of the weights files; ``benchmark.weights.weights_folder`` by default.
            random_seed: for tests and dry runs; the digest then says ``random-SEED``.

        Raises:
            UserError: its file is missing or does not fit.
        """
        digest = weights_digest(name, weights) if random_seed is None else f"random-{random_seed}"
        with torch.device("meta"):  # the file brings every number; drawing them first would take longer than reading
            network = cls(name, digest)
        if random_seed is None:
            load_weights(network.net, weights_file(name, weights), DOWNLOADS[name].title, cls.UNUSED)
        else:
            seeded(network.net, name, random_seed)
        network.freeze()
        return network

    @staticmethod
    def build() -> nn.Module:
        """Return the architecture, without the parts that no layer needs."""
        raise NotImplementedError

    def taps(self, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return ``layers`` of normalised images; here the network's only output."""
        return {self.LAYERS[0]: self.net(x)}

    def features(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the named layers of ``images`` (B x 3 x H x W, float in [0, 1]), maps or vectors, float32.

        Raises:
            ValueError: the network has no such layer.
        """
        for layer in layers:
            if layer not in self.LAYERS:
                raise ValueError(f"network '{self.name}' has no layer '{layer}'; it has {', '.join(self.LAYERS)}")
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with _full_precision(x.device.type):
            found = self.taps(x, layers)
        return {layer: found[layer] for layer in layers}


class AlexNet(ScoringNetwork):
    """torchvision's AlexNet. Layers: its five ReLUs, ``features.1`` .. ``features.11`` (maps)."""

    LAYERS = tuple(f"features.{k}" for k in (1, 4, 7, 9, 11))
    UNUSED = ("classifier.",)

    @staticmethod
    def build() -> nn.Module:
        """Return the convolutions; the classifier is 58 of the network's 61 million parameters."""
        from torchvision.models import alexnet

        net = alexnet(weights=None)
        net.classifier = nn.Identity()
        return net

    def taps(self, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return ``layers`` of normalised images, and compute nothing beyond the last of them."""
        found: dict[str, Tensor] = {}
        for k, module in enumerate(self.net.get_submodule("features").children()):
            x = module(x)
            if (layer := f"features.{k}") in layers:
                found[layer] = x
                if len(found) == len(set(layers)):
                    break
        return found


class InceptionV3(ScoringNetwork):
    """torchvision's Inception-v3. Layer: ``avgpool`` (B x 2048).

    The published code takes ImageNet's mean and deviation out, and then the model, whose weights are TensorFlow's,
    maps them to [-1, 1] itself (``transform_input``, on with these weights).
    """

    UNUSED = ("fc.", "AuxLogits.")

    @staticmethod
    def build() -> nn.Module:
        """Return the network without its classifiers."""
        from torchvision.models import inception_v3

        net = inception_v3(weights=None, transform_input=True, aux_logits=False, init_weights=False)
        net.fc = nn.Identity()
        return net


class EfficientNetB1(ScoringNetwork):
    """torchvision's EfficientNet-B1. Layer: ``avgpool`` (B x 1280)."""

    UNUSED = ("classifier.",)

    @staticmethod
    def build() -> nn.Module:
        """Return the network without its classifier."""
        from torchvision.models import efficientnet_b1

        net = efficientnet_b1(weights=None)
        net.classifier = nn.Identity()
        return net


class SwavResNet50(ScoringNetwork):
    """SwAV's ResNet-50, which is torchvision's. Layer: ``avgpool`` (B x 2048)."""

    UNUSED = ("fc.", "projection_head.", "prototypes.")

    @staticmethod
    def build() -> nn.Module:
        """Return the network without its classifier."""
        from torchvision.models import resnet50

        net = resnet50(weights=None)
        net.fc = nn.Identity()
        return net


class ClipVitL14(ScoringNetwork):
    """OpenAI's CLIP ViT-L/14 at 224 pixels. Layer: ``embedding`` (B x 768), after the projection, not normalised."""

    LAYERS = ("embedding",)
    # The text tower, by OpenAI's names and by open_clip's, and the numbers that OpenAI's archive carries.
    UNUSED = (
        "transformer.",
        "token_embedding.",
        "positional_embedding",
        "ln_final.",
        "text_projection",
        "text.",
        "logit_scale",
        "logit_bias",
        "attn_mask",
        "input_resolution",
        "context_length",
        "vocab_size",
    )
    STATISTICS = CLIP

    @staticmethod
    def build() -> nn.Module:
        """Return the image tower, under the name that it has in the whole model."""
        from open_clip.transformer import QuickGELU, VisionTransformer

        tower = VisionTransformer(
            image_size=224,
            patch_size=14,
            width=1024,
            layers=24,
            heads=16,
            mlp_ratio=4.0,
            output_dim=768,
            act_layer=QuickGELU,  # what OpenAI trained with; the exact GELU gives other embeddings
        )
        return nn.ModuleDict({"visual": tower})

    def taps(self, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the embedding of normalised images.

        Raises:
            ValueError: the images do not have the size that the position embeddings are for.
        """
        if x.shape[-2:] != (224, 224):
            raise ValueError(f"network '{self.name}' takes 224 x 224 pixels, not {x.shape[-1]} x {x.shape[-2]}")
        return {"embedding": self.net.get_submodule("visual")(x)}


_CLASSES: dict[str, type[ScoringNetwork]] = {
    "alexnet": AlexNet,
    "inception_v3": InceptionV3,
    "efficientnet_b1": EfficientNetB1,
    "efficientnet_b1_v1": EfficientNetB1,
    "swav_resnet50": SwavResNet50,
    "clip_vit_l14": ClipVitL14,
}


def scoring_network(name: str, weights: Path | None = None, random_seed: int | None = None) -> ScoringNetwork:
    """Return a judge by its name in protocols; arguments and errors as of :meth:`ScoringNetwork.loaded`."""
    return _CLASSES[name].loaded(name, weights, random_seed)


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Compute in float32 whatever the surrounding program allows: no autocast, no TF32 in convolutions or products."""
    backends: Any = torch.backends
    convolutions, products = backends.cudnn.conv, (backends.cuda.matmul, backends.mkldnn.matmul)
    before = convolutions.fp32_precision, [product.fp32_precision for product in products]
    lowered = {"tf32", "bf16"}.intersection(before[1])
    convolutions.fp32_precision = "ieee"
    if lowered:  # by this function, which knows both of torch's ways to set it; they must not disagree
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        convolutions.fp32_precision = before[0]
        if lowered:
            torch.set_float32_matmul_precision("medium" if "bf16" in lowered else "high")
