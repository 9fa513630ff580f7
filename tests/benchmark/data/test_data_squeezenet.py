"""SqueezeNet's weights: read safely, mapped rightly."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import squeezenet1_1

from benchmark.data import squeezenet
from benchmark.data.squeezenet import SqueezeNet
from benchmark.errors import UserError


def test_a_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squeezenet, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="missing or damaged"):
        squeezenet.weights_path()


def test_its_logits_are_those_of_torchvision_with_the_same_weights() -> None:
    ours = SqueezeNet()
    reference = squeezenet1_1(weights=None).eval()
    reference.load_state_dict(ours.net.state_dict())
    images = torch.randint(0, 255, (2, 3, 96, 96), generator=torch.Generator().manual_seed(0)).float()
    bgr = images[:, [2, 1, 0]] - torch.tensor([104.0, 117.0, 123.0])[:, None, None]
    fire5, fire9, logits = ours(images)
    torch.testing.assert_close(logits, reference(bgr).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fire5, reference.features[:8](bgr).detach()[:, :256], rtol=1e-4, atol=1e-3)
    assert fire9.shape[1] == 512
