"""The published evaluations written out plainly: one image at a time, with the libraries that their own code calls.

These are what the package's scores are held against, so nothing of the package is imported here and nothing is shared,
batched or fast. What each paper does is stated in its own repository:

- Brain-IT: utils/metric_functions.py of the official code
- MindEye2: MedARC-AI/MindEyeV2, src/final_evaluations.ipynb (torchvision 0.16)
- MindEye: MedARC-AI/fMRI-reconstruction-NSD, src/Reconstruction_Metrics.py (torchvision 0.15)
- Brain-Diffuser: ozcelikfu/brain-diffuser, scripts/eval_extract_features.py, scripts/evaluate_reconstruction.py
  (scikit-image 0.17.2, pillow 9.2)
- NeuroPictor: jingyanghuo/neuropictor, eval_metrics.py (torchvision 0.16)
- MindBridge: littlepure2333/MindBridge, src/eval.py (torchvision 0.15)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb
from typing import Literal

import lpips
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.distance import correlation
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.nn.functional import interpolate

Picture = NDArray[np.uint8]  # height x width x 3
Pixels = NDArray[np.floating]  # height x width x 3 in [0, 1]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NORMALISATION = {
    "alexnet": IMAGENET,
    "inception_v3": IMAGENET,
    "efficientnet_b1": IMAGENET,
    "swav_resnet50": IMAGENET,
    "clip_vit_l14": OPENAI,
}


# --- Preparation ------------------------------------------------------------------------------------------------------


def to_tensor(picture: Picture, dtype: torch.dtype = torch.float32) -> Tensor:
    """1 x 3 x height x width in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(dtype) / 255


def resize(image: Tensor, size: int, mode: str = "bilinear") -> Tensor:
    """What transforms.Resize did to a tensor before torchvision 0.17: no antialiasing, nothing where the size fits."""
    if image.shape[-2:] == (size, size):
        return image
    return interpolate(image, size=(size, size), mode=mode, align_corners=False, antialias=False)


def normalise(image: Tensor, network: str) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in NORMALISATION[network])
    return (image - mean) / std


@dataclass(frozen=True)
class TensorPaper:
    """A paper that scores float tensors: all sizes are made with tensor interpolation, antialiasing off."""

    common: int | None
    """Both images are brought to this size before anything else."""
    blend: float | None = None
    """The reconstruction's share where a low-level reconstruction is mixed in."""
    clip_mode: str = "bilinear"

    def image(self, picture: Picture, blurry: Picture | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        image = to_tensor(picture, dtype).clamp(0, 1)
        if self.common is not None:
            image = resize(image, self.common)
        if blurry is not None:
            assert self.blend is not None and self.common is not None
            image = image * self.blend + resize(to_tensor(blurry, dtype), self.common) * (1 - self.blend)
        return image

    def pixels(self, picture: Picture, blurry: Picture | None = None, dtype: torch.dtype = torch.float64) -> Pixels:
        """In double precision: the papers' single precision leaves up to some 1e-6 of rounding in an SSIM."""
        return resize(self.image(picture, blurry, dtype), 425)[0].permute(1, 2, 0).numpy()

    def network_image(self, network: str, picture: Picture, blurry: Picture | None = None) -> Tensor:
        size = {
            "alexnet": 256,
            "inception_v3": 342,
            "clip_vit_l14": 224,
            "efficientnet_b1": 255,
            "swav_resnet50": 224,
        }[network]
        mode = self.clip_mode if network == "clip_vit_l14" else "bilinear"
        return resize(self.image(picture, blurry), size, mode)


@dataclass(frozen=True)
class PillowPaper:
    """A paper that resizes 8-bit files with Pillow: always antialiased on the way down, rounded to 8 bits."""

    def pixels(self, picture: Picture, blurry: None = None, dtype: torch.dtype = torch.float64) -> Pixels:
        file = Image.fromarray(picture)
        if file.size != (425, 425):  # reconstructions; the truths are NSD's own 425 pixels
            file = file.resize((425, 425), Image.Resampling.BICUBIC)  # Image.resize's default since Pillow 7
        return np.array(file) / 255.0

    def network_image(self, network: str, picture: Picture, blurry: None = None) -> Tensor:
        return to_tensor(np.array(Image.fromarray(picture).resize((224, 224), Image.Resampling.BILINEAR)))


Paper = TensorPaper | PillowPaper
PAPERS: dict[str, Paper] = {
    "brain-it": TensorPaper(common=224),
    "mindeye2": TensorPaper(common=256, blend=0.75),
    "mindeye2-unblended": TensorPaper(common=256),
    "mindeye1": TensorPaper(common=256),
    "brain-diffuser": PillowPaper(),
    "brain-diffuser-skimage017": PillowPaper(),
    "neuropictor": TensorPaper(common=256, clip_mode="bicubic"),
    "mindbridge": TensorPaper(common=None),
}
SIZES = {
    "brain-it": (224, 224),
    "mindeye2": (224, 768),
    "mindeye2-unblended": (224, 768),
    "mindeye1": (256, 512),
    "brain-diffuser": (425, 512),
    "brain-diffuser-skimage017": (425, 512),
    "neuropictor": (512, 512),
    "mindbridge": (256, 512),
}
"""Side of a truth and of a reconstruction as each paper's evaluation loads them."""


def neuropictor_truth_file(picture: Picture) -> Picture:
    """The truth as NeuroPictor's reconstruction script writes it, and its evaluation reads it: 512 pixels, truncated."""
    big = to_tensor(np.array(Image.fromarray(picture).resize((512, 512), Image.Resampling.BILINEAR)))
    scaled = ((big - 0.5) / 0.5 + 1) / 2  # to [-1, 1] for the model and back
    return (255.0 * scaled.clamp(0, 1)[0].permute(1, 2, 0).numpy()).astype(np.uint8)


# --- Pixels -----------------------------------------------------------------------------------------------------------


def pixcorr(truth: Pixels, recon: Pixels) -> float:
    return float(np.corrcoef(truth.reshape(1, -1), recon.reshape(1, -1))[0, 1])


def ssim_grey(truth: Pixels, recon: Pixels) -> float:
    """The published call from scikit-image 0.20 on, where ``multichannel=True`` is swallowed without effect."""
    return float(
        structural_similarity(
            rgb2gray(recon),
            rgb2gray(truth),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
        )
    )


def ssim_columns(truth: Pixels, recon: Pixels) -> float:
    """The published call up to scikit-image 0.19.3: ``multichannel=True`` makes each column of the grey image a channel.

    A channel is then one-dimensional, and its similarity is that of a column with the column at its place.
    """
    x, y = rgb2gray(recon).astype(np.float64), rgb2gray(truth).astype(np.float64)
    return float(np.mean([_ssim_of_column(x[:, k], y[:, k]) for k in range(x.shape[1])]))


def _ssim_of_column(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    def blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return gaussian_filter1d(values, sigma=1.5, truncate=3.5, mode="reflect")

    mean_x, mean_y = blurred(x), blurred(y)
    var_x = blurred(x * x) - mean_x * mean_x
    var_y = blurred(y * y) - mean_y * mean_y
    cov = blurred(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    similar /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float(similar[5:-5].mean())  # the filter is 11 long


def ssim_colour(truth: Pixels, recon: Pixels) -> float:
    return float(
        structural_similarity(
            recon,
            truth,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
        )
    )


def pixel_scores(
    name: str,
    truths: Sequence[Picture],
    recons: Sequence[Picture],
    blurry: Sequence[Picture] | None = None,
    dtype: torch.dtype = torch.float64,
    colours: int | None = None,
) -> dict[str, NDArray[np.float64]]:
    """PixCorr and SSIM of every pair under the paper ``name``, SSIM-color of the first ``colours`` (None: all)."""
    paper = PAPERS[name]
    grey = ssim_columns if name == "brain-diffuser-skimage017" else ssim_grey
    scores: dict[str, list[float]] = {"PixCorr": [], "SSIM": [], "SSIM-color": []}
    for k in range(len(truths)):
        low = None if blurry is None else blurry[k]
        truth, recon = paper.pixels(truths[k], None, dtype), paper.pixels(recons[k], low, dtype)  # type: ignore[arg-type]
        scores["PixCorr"].append(pixcorr(truth, recon))
        scores["SSIM"].append(grey(truth, recon))
        if colours is None or k < colours:
            scores["SSIM-color"].append(ssim_colour(truth, recon))
    return {key: np.array(values) for key, values in scores.items()}


# --- Networks ---------------------------------------------------------------------------------------------------------


def tap(model: nn.Module, layer: str) -> Callable[[Tensor], NDArray[np.float32]]:
    """Run ``model`` and return what ``layer`` put out, flattened; "" is the model's own output."""

    def features(x: Tensor) -> NDArray[np.float32]:
        seen: list[Tensor] = []
        hook = model.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        try:
            with torch.no_grad():
                model(x)
        finally:
            hook.remove()
        return seen[0].float().flatten().numpy()

    return features


TAPS = {
    "Alex(2)": ("alexnet", "features.4"),
    "Alex(5)": ("alexnet", "features.11"),
    "Incep": ("inception_v3", "avgpool"),
    "CLIP": ("clip_vit_l14", ""),
    "Eff": ("efficientnet_b1", "avgpool"),
    "SwAV": ("swav_resnet50", "avgpool"),
}
"""Metric -> the network and the layer whose output is compared."""


def features(
    name: str, key: str, model: nn.Module, pictures: Sequence[Picture], blurry: Sequence[Picture] | None = None
) -> NDArray[np.float32]:
    """Images x features that metric ``key`` compares under the paper ``name``; pass ``blurry`` with reconstructions."""
    network, layer = TAPS[key]
    run = tap(model, layer)
    rows = []
    for k, picture in enumerate(pictures):
        low = None if blurry is None else blurry[k]
        image = PAPERS[name].network_image(network, picture, low)  # type: ignore[arg-type]
        rows.append(run(normalise(image, network)))
    return np.stack(rows)


def correlations(truths: NDArray[np.floating], recons: NDArray[np.floating]) -> NDArray[np.float64]:
    """N x N: row i is truth i, column j is reconstruction j."""
    n = len(truths)
    return np.corrcoef(truths, recons)[:n, n:]


def two_way_wins(r: NDArray[np.float64]) -> NDArray[np.int64]:
    """Truths that each reconstruction resembles less than its own: a tie is no win."""
    n = len(r)
    return np.array([sum(bool(r[i, j] < r[j, j]) for i in range(n)) for j in range(n)])


def n_way_top1(wins: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """Probability that the own truth is first among itself and n - 1 others drawn from all others without replacement."""
    others = len(wins) - 1
    return np.array([float(Fraction(comb(int(w), n - 1), comb(others, n - 1))) for w in wins])


def retrieval_by_drawing(
    truth: NDArray[np.floating],
    recon: NDArray[np.floating],
    pool: NDArray[np.floating],
    drawn: Sequence[int],
) -> bool:
    """One draw of Brain-IT's n-way: is the truth the best of itself and the drawn pool images, by correlation."""
    candidates = np.stack([truth, *pool[list(drawn)]])
    return bool(np.argmax(np.corrcoef(recon, candidates)[0, 1:]) == 0)


def distances(truths: NDArray[np.floating], recons: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.array(
        [correlation(t.astype(np.float64), r.astype(np.float64)) for t, r in zip(truths, recons, strict=True)]
    )


def lpips_model(alexnet: nn.Module) -> lpips.LPIPS:
    """LPIPS v0.1 with its own heads on the trunk of ``alexnet``."""
    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    state = alexnet.get_submodule("features").state_dict()
    for part in (model.net.slice1, model.net.slice2, model.net.slice3, model.net.slice4, model.net.slice5):
        part.load_state_dict({key: state[key] for key in part.state_dict()})
    return model


def lpips_distances(model: lpips.LPIPS, truths: Sequence[Tensor], recons: Sequence[Tensor]) -> NDArray[np.float64]:
    """LPIPS of 1 x 3 x height x width images in [0, 1], which it takes as [-1, 1]."""
    with torch.no_grad():
        return np.array([float(model(r * 2.0 - 1.0, t * 2.0 - 1.0)) for t, r in zip(truths, recons, strict=True)])


# --- The networks themselves ------------------------------------------------------------------------------------------


def build(name: Literal["alexnet", "inception_v3", "clip_vit_l14", "efficientnet_b1", "swav_resnet50"]) -> nn.Module:
    """The architecture that the papers load, weights as its library initialises them."""
    import open_clip
    from torchvision import models

    if name == "inception_v3":  # torchvision sets transform_input with its own weights
        model: nn.Module = models.inception_v3(weights=None, transform_input=True, init_weights=False)
    elif name == "clip_vit_l14":  # OpenAI's models have the quick GELU
        model = open_clip.create_model("ViT-L-14-quickgelu").visual
    else:
        model = {
            "alexnet": models.alexnet,
            "efficientnet_b1": models.efficientnet_b1,
            "swav_resnet50": models.resnet50,
        }[name](weights=None)
    return model.eval().requires_grad_(False)


def lively(model: nn.Module, seed: int) -> nn.Module:
    """Draw weights under which every part matters: signals keep their size, batch norms have statistics of their own.

    As the libraries draw them, deep networks give almost the same vector for every image, and batch norms with
    statistics 0 and 1 would hide a network that ignores them.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0].numel()
            module.weight.copy_((2 / fan) ** 0.5 * torch.randn(module.weight.shape, generator=generator))
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            n = module.num_features
            module.running_mean.copy_(0.1 * torch.randn(n, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(n, generator=generator))
            module.weight.copy_(0.8 + 0.4 * torch.rand(n, generator=generator))
            module.bias.copy_(0.1 * torch.randn(n, generator=generator))
    return model


def openai_embedding(weights: Mapping[str, Tensor], heads: int, x: Tensor) -> Tensor:
    """The image tower of OpenAI's CLIP from its published weights, operation by operation: B x 3 x 224 x 224 -> B x F.

    Pre-norm blocks with the quick GELU; the class token after the last norm, projected, at its own length.
    """

    def norm(name: str, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    patches = weights["conv1.weight"]
    x = torch.nn.functional.conv2d(x, patches, stride=patches.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([weights["class_embedding"].expand(len(x), 1, -1), x], dim=1) + weights["positional_embedding"]
    x = norm("ln_pre", x)
    blocks = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("transformer.resblocks."))
    for k in range(blocks):
        block = f"transformer.resblocks.{k}"
        y = norm(f"{block}.ln_1", x)
        qkv = y @ weights[f"{block}.attn.in_proj_weight"].T + weights[f"{block}.attn.in_proj_bias"]
        q, k_, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        attention = torch.softmax(q @ k_.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        x = x + linear(f"{block}.attn.out_proj", (attention @ v).transpose(1, 2).flatten(2))
        y = linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))
        x = x + linear(f"{block}.mlp.c_proj", y * torch.sigmoid(1.702 * y))
    return norm("ln_post", x[:, 0]) @ weights["proj"]
