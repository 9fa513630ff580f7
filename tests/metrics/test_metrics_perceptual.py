"""The perceptual distance against the lpips package, on a trunk of random weights (nothing is downloaded)."""

import dataclasses

import lpips
import pytest
import torch
from torchvision.models import alexnet

from metrics.perceptual import lpips_heads, perceptual_distance
from metrics.protocols import BRAIN_IT

HEADS = BRAIN_IT.slots["LPIPS"].heads
TAPS = (1, 4, 7, 9, 11)


@pytest.fixture(scope="module")
def reference() -> lpips.LPIPS:
    torch.manual_seed(0)
    return lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()


def taps(reference: lpips.LPIPS, images: torch.Tensor) -> list[torch.Tensor]:
    """The five ReLUs of torchvision's AlexNet that shares the reference's trunk, for RGB in [0, 1]."""
    with torch.device("meta"):
        trunk = alexnet(weights=None).features.eval()
    trunk = trunk.to_empty(device="cpu")
    parts = [
        reference.net.slice1,
        reference.net.slice2,
        reference.net.slice3,
        reference.net.slice4,
        reference.net.slice5,
    ]
    trunk.load_state_dict({name: value for part in parts for name, value in part.state_dict().items()})
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x, out = (images - mean) / std, []
    for k, layer in enumerate(trunk):
        x = layer(x.clone())
        if k in TAPS:
            out.append(x.clone())
    return out


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum")
@torch.inference_mode()
def test_equals_lpips_with_its_heads_and_its_baseline_without(reference: lpips.LPIPS) -> None:
    assert HEADS is not None
    a, b = torch.rand(3, 3, 80, 80), torch.rand(3, 3, 80, 80)
    expected = reference(2 * a - 1, 2 * b - 1).flatten().double()
    found = perceptual_distance(taps(reference, a), taps(reference, b), lpips_heads(HEADS))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)

    reference.lpips = False
    baseline = reference(2 * a - 1, 2 * b - 1).flatten().double()
    reference.lpips = True
    found = perceptual_distance(taps(reference, a), taps(reference, b))
    torch.testing.assert_close(found, baseline, rtol=1e-5, atol=1e-7)


def test_equal_maps_are_at_distance_zero_and_dead_ones_stay_finite() -> None:
    maps = [torch.rand(2, 8, 5, 5), torch.rand(2, 16, 3, 3)]
    assert perceptual_distance(maps, maps).tolist() == [0, 0]
    dead = [torch.zeros_like(m) for m in maps]
    assert perceptual_distance(dead, dead).tolist() == [0, 0]
    torch.testing.assert_close(perceptual_distance(maps, dead), torch.full((2,), 2.0).double())
    assert (perceptual_distance(maps, [m.flip(0) for m in maps]) > 0).all()


def test_heads_are_five_checked_and_not_negative() -> None:
    assert HEADS is not None
    heads = lpips_heads(HEADS)
    assert [len(h) for h in heads] == [64, 192, 384, 256, 256] and all((h >= 0).all() for h in heads)
    with pytest.raises(ValueError, match="missing or not LPIPS v0.1 AlexNet; type: pip install"):
        lpips_heads(dataclasses.replace(HEADS, sha256="0" * 64))
    with pytest.raises(ValueError, match=r"heads weigh \[64, 192, 384, 256, 256\] channels, the layers have \[8\]"):
        perceptual_distance([torch.rand(1, 8, 2, 2)], [torch.rand(1, 8, 2, 2)], heads)
