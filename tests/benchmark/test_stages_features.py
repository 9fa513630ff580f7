"""Features that are computed when asked for equal those that are kept; adapters train, and their images are shifted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmark import networks
from benchmark.stages import encoder as encoder_stage
from benchmark.stages.bit import Pool
from benchmark.stages.encoder import Predictor
from benchmark.stages.features import LiveTaps, LowLevelTargets, SemanticTargets, StoredTaps, is_static
from benchmark.stages.prepare import Prepared

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it


@pytest.fixture(scope="module")
def data(tiny_run: Any) -> Prepared:
    return Prepared(tiny_run.folder("prepare"))


def with_adapters(tiny_run: Any) -> dict[str, Any]:
    return {**tiny_run.stage("encoder").config, "adapter_rank": 2, "max_shift": 2}


def test_taps_without_adapters_equal_the_stored_ones(tiny_run: Any, data: Prepared) -> None:
    config = dict(tiny_run.stage("encoder").config)
    assert is_static(config) and not is_static(with_adapters(tiny_run))
    stored, live = StoredTaps(tiny_run.folder("targets"), 5, "cpu"), LiveTaps(config, data, "cpu")
    assert stored.sizes == live.sizes
    rows = np.array([0, data.n_targets - 1])
    with torch.no_grad():
        for kept, computed in zip(stored(rows), live(rows), strict=True):
            torch.testing.assert_close(kept, computed, atol=2e-3 * float(computed.abs().max()), rtol=2e-3)


def test_semantic_tokens_equal_the_stored_ones(tiny_run: Any, data: Prepared) -> None:
    folder, config = tiny_run.folder("targets"), tiny_run.stage("targets").config
    live = {**config, "store": {**config["store"], "semantic": "live"}}
    kept, computed = (SemanticTargets(folder, c, data, "cpu") for c in (config, live))
    assert (kept.tokens, kept.width) == (computed.tokens, computed.width) == (16, 320)
    rows = np.array([5, 2, data.n_targets - 1])
    torch.testing.assert_close(kept(rows), computed(rows), atol=5e-3, rtol=5e-3)


def test_low_level_maps_equal_the_stored_ones(tiny_run: Any, data: Prepared, tmp_path: Path) -> None:
    folder, stage = tiny_run.folder("targets"), tiny_run.stage("targets").config
    config = {**tiny_run.stage("lowlevel").config, "standardise": False, "centre": False}
    (tmp_path / "shapes.json").write_text((folder / "shapes.json").read_text())
    kept, computed = LowLevelTargets(folder, config), LowLevelTargets(tmp_path, config, stage, data)
    assert kept.tokens == computed.tokens
    rows = np.array([1, 7])
    torch.testing.assert_close(kept(rows), computed(rows), atol=5e-3, rtol=5e-3)
    with pytest.raises(ValueError, match="computed from the images"):
        LowLevelTargets(tmp_path, config)(rows)


def test_responses_predicted_for_a_batch_equal_the_stored_ones(tiny_run: Any, data: Prepared, tmp_path: Path) -> None:
    predict = Predictor(
        tiny_run.stage("external").config, data, tiny_run.folder("targets"), tiny_run.folder("encoder"), "cpu"
    )
    kept, live = Pool(data, tiny_run.folder("external"), 0.5, 0), Pool(data, tmp_path, 0.5, 0, predict)
    for step in range(3):
        a, b = (pool.draw(8, step, torch.Generator().manual_seed(step)) for pool in (kept, live))
        assert np.array_equal(a.rows, b.rows) and torch.equal(a.subject, b.subject)
        torch.testing.assert_close(a.betas, b.betas, atol=3e-3, rtol=3e-3)


def test_adapters_train_with_the_encoder_and_the_backbone_stays(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds both; what follows reads them back; the frozen weights do not change by a bit."""
    made: list[Any] = []
    original = networks.encoder_backbone

    def remember(*args: Any, **kwargs: Any) -> Any:
        backbone = original(*args, **kwargs)
        made.append((backbone, {n: p.clone() for n, p in backbone.named_parameters() if not p.requires_grad}))
        return backbone

    monkeypatch.setattr(networks, "encoder_backbone", remember)
    stage = tiny_run.stage("encoder")
    training = {**stage.config["training"], "steps": 6, "validate_every": 3}
    ctx = tiny_run.context(stage, tmp_path / "out", adapter_rank=2, max_shift=2, training=training)
    encoder_stage.run(ctx)
    found = load_file(ctx.out / "encoder.safetensors")
    downs = [value for name, value in found.items() if name.startswith("adapters.") and name.endswith(".down")]
    assert len(downs) == 7 and all(bool(down.abs().sum() > 0) for down in downs), "they start at zero"
    (backbone, frozen) = made[0]
    assert frozen and all(torch.equal(dict(backbone.named_parameters())[n], p) for n, p in frozen.items())

    data = Prepared(tiny_run.folder("prepare"))
    config = {**tiny_run.stage("external").config, "adapter_rank": 2, "max_shift": 2}
    predict = Predictor(config, data, tiny_run.folder("targets"), ctx.out, "cpu")
    rows = np.array([0, 3])
    first, again = predict(rows, [0, 1]), predict(rows, [0, 1])
    assert [r.shape for r in first] == [(2, n) for n in data.n_voxels]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "no shift outside training"


def test_checkpointing_changes_no_gradient(tiny_run: Any, data: Prepared) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        taps = LiveTaps(with_adapters(tiny_run), data, "cpu", checkpointing)
        assert taps.adapters is not None
        for p in taps.adapters.parameters():
            torch.nn.init.normal_(p, std=0.1)
        images = taps.read(np.array([0, 1]), torch.Generator().manual_seed(1))
        sum(tap.square().mean() for tap in taps.compute(images)).backward()
        gradients.append([p.grad for p in taps.adapters.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_training_images_are_shifted_by_the_steps_generator(tiny_run: Any, data: Prepared) -> None:
    taps = LiveTaps(with_adapters(tiny_run), data, "cpu")
    rows = np.arange(4)
    with torch.no_grad():
        generators = (None, *(torch.Generator().manual_seed(1) for _ in range(2)))
        still, moved, same = (taps.compute(taps.read(rows, generator))[0] for generator in generators)
    assert torch.equal(moved, same) and not torch.allclose(still, moved)
