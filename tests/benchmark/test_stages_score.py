"""Stages ``score`` and ``references``: the table on disk, and the numbers in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from benchmark import networks
from benchmark.stages import KINDS, image_name, seen_name
from benchmark.stages.prepare import Prepared
from benchmark.stages.reconstruct import read_images
from benchmark.stages.score import REPEATS
from benchmark.store import read_json
from benchmark.weights import weights_digest
from metrics.cards import CARDS
from metrics.evaluate import Scores, evaluate
from metrics.protocols import PROTOCOLS, protocol_hash

pytestmark = pytest.mark.timeout(900)  # the first test that needs the small sweep waits for it
DEMO = PROTOCOLS["demo"]
COLUMNS = {
    "track": "string",
    "method": "string",
    "variant": "string",
    "subject": "int64",
    "seed": "int64",
    "image_id": "int64",
    "metric": "string",
    "value": "double",
}


@pytest.fixture(scope="module")
def judges() -> dict[str, networks.FeatureNetwork]:
    return {name: networks.feature_network(name) for name in DEMO.networks}


def table(tiny_run: Any, role: str, variant: str = "clusters=128") -> pd.DataFrame:
    return pq.read_table(tiny_run.folder(role, variant) / "scores.parquet").to_pandas()


def images_of(tiny_run: Any, kind: str, subject: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Reconstructions, seen images and ids of a subject."""
    folder = tiny_run.folder("reconstruct")
    index = np.load(folder / "index.npy")
    ids = index[index[:, 0] == subject, 1].tolist()
    seen = read_images(folder / "seen", [seen_name(image) for image in ids])
    return read_images(folder / kind, [image_name(subject, image) for image in ids]), seen, ids


@pytest.mark.parametrize(("role", "variants"), [("score", list(KINDS)), ("references", ["mean image", "shuffled"])])
def test_one_row_an_image_and_metric(tiny_run: Any, role: str, variants: list[str]) -> None:
    schema = pq.read_schema(tiny_run.folder(role) / "scores.parquet")
    assert {field.name: str(field.type).removeprefix("large_") for field in schema} == COLUMNS
    scores = table(tiny_run, role)
    assert not scores.duplicated(["method", "variant", "subject", "image_id", "metric"]).any()
    assert set(scores.variant) == set(variants) and set(scores.subject) == {1, 2} and set(scores.metric) == set(CARDS)
    assert len(scores) == len(variants) * 2 * 4 * len(CARDS) and np.isfinite(scores.value).all()
    assert set(scores.track) == {"demo"} and set(scores.seed) == {0}


def same(scores: pd.DataFrame, expected: Scores, subject: int, variant: str) -> None:
    own = scores[(scores.subject == subject) & (scores.variant == variant)]
    for key, values in expected.per_image.items():
        found = own[own.metric == key].set_index("image_id").loc[list(expected.image_ids)].value
        assert np.allclose(found, values, rtol=1e-5, atol=1e-6), key


def test_scores_are_what_the_metrics_say(tiny_run: Any, judges: dict[str, networks.FeatureNetwork]) -> None:
    scores = table(tiny_run, "score")
    for subject, kind in ((1, "combined"), (2, "lowlevel")):
        recons, seen, ids = images_of(tiny_run, kind, subject)
        same(scores, evaluate(recons, seen, DEMO, judges, ids), subject, kind)


def test_the_protocols_hash_says_what_was_scored(tiny_run: Any) -> None:
    _, _, ids = images_of(tiny_run, "combined", 1)
    digests = {name: weights_digest(name) for name in DEMO.networks}
    expected = protocol_hash(DEMO, digests, ids, subjects=[1, 2], repeats=REPEATS)
    for role, variant in (("score", "clusters=8"), ("score", "clusters=128"), ("references", "clusters=128")):
        about = read_json(tiny_run.folder(role, variant) / "protocol.json")
        assert about == {"protocol": "demo", "protocol_hash": expected, "subjects": [1, 2], "n_images": 4}
    assert tiny_run.stage("score").digests == digests


def test_the_summary_has_the_means(tiny_run: Any) -> None:
    summary = read_json(tiny_run.folder("score") / "status.json")["summary"]
    scores = table(tiny_run, "score")
    for kind in KINDS:
        for key in CARDS:
            expected = scores[(scores.variant == kind) & (scores.metric == key)].value.mean()
            assert summary[f"Brain-IT {kind} {key}"] == pytest.approx(expected)


def test_shuffled_images_all_go_to_a_wrong_recording(tiny_run: Any) -> None:
    scores = table(tiny_run, "references")
    for subject in (1, 2):
        recons, seen, ids = images_of(tiny_run, "combined", subject)
        own = scores[(scores.subject == subject) & (scores.variant == "shuffled") & (scores.metric == "PixCorr")]
        values = own.set_index("image_id").loc[ids].value.to_numpy()
        every = np.array([[correlation(image, truth) for image in recons] for truth in seen])
        given = np.abs(every - values[:, None]).argmin(1)
        assert np.allclose(every[np.arange(len(ids)), given], values, atol=1e-6)
        assert sorted(given) == list(range(len(ids))), "each image once"
        assert not (given == np.arange(len(ids))).any(), "none to its own"


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_the_mean_image_is_that_of_the_subjects_training_images(
    tiny_run: Any, judges: dict[str, networks.FeatureNetwork]
) -> None:
    data = Prepared(tiny_run.folder("prepare"))
    scores = table(tiny_run, "references")
    for position, subject in enumerate(data.subjects):
        _, seen, ids = images_of(tiny_run, "combined", subject)
        own = [image for image in data.train_ids if image in data.seen_ids[position]]
        assert len(own) == 14
        mean = np.stack([data.images[image] for image in own]).astype(float).mean(0).round().astype(np.uint8)
        expected = evaluate(np.stack([mean] * len(ids)), seen, DEMO, judges, ids, keys=["PixCorr", "SSIM", "Eff"])
        same(scores, expected, subject, "mean image")


def test_an_image_that_tells_nothing_is_identified_by_chance(tiny_run: Any) -> None:
    scores = table(tiny_run, "references")
    means = scores[scores.variant == "mean image"].groupby(["metric", "subject"]).value.mean()
    identified = [key for key, slot in DEMO.slots.items() if slot.measure == "identification"]
    assert len(identified) == 4
    for key in identified:
        assert means[key].to_numpy() == pytest.approx(0.5, abs=1e-12)
    assert means["CLIP-1000"].to_numpy() == pytest.approx(1 / 4, abs=1e-12)


def test_pixcorr_agrees_with_numpy(tiny_run: Any) -> None:
    """One number of the table by hand, from the PNGs."""
    recons, seen, ids = images_of(tiny_run, "combined", 2)
    scores = table(tiny_run, "score")
    own = scores[(scores.subject == 2) & (scores.variant == "combined") & (scores.metric == "PixCorr")]
    assert own.set_index("image_id").loc[ids].value.to_numpy() == pytest.approx(
        [correlation(a, b) for a, b in zip(recons, seen, strict=True)], abs=1e-9
    )
