"""A small site with everything on it, and one Chromium for all tests of this folder."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from chromium import Chromium, why_not  # noqa: E402

from leaderboard.ranking import rank  # noqa: E402
from leaderboard.schema import Cost, Interval, Manifest, Row  # noqa: E402
from leaderboard.site import Chapter, build_report  # noqa: E402
from leaderboard.statistics import scores  # noqa: E402

EVIL = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script>\'"&'
CLUSTERS = {"8": "brainit_T3_k8", "32": "brainit_T3_k32", "128": "brainit_40h", "512": "brainit_T3_k512"}
JUDGES = {"CLIP": "stand-in EfficientNet-Lite2, pooled"}


def _sweeps() -> Any:
    spec = importlib.util.spec_from_file_location("fake_sweep", HERE.parent / "leaderboard" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_sweep


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A sweep of the demo track with images, one variant of it a stranger's, and rows of the paper track."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "pictures").mkdir()
    names = {f"clusters={k}": float(k) for k in CLUSTERS}
    fake = _sweeps()(folder / "pictures", {**names, EVIL: 64.0}, n_images=16, shown=16)
    rows = []
    for row in fake.rows:
        own: dict[str, Any] = {"notes": EVIL if row.variant == EVIL else "", "judges": JUDGES}
        if row.kind == "method":
            k = row.variant.split("=")[1] if row.variant in names else "64"
            own |= {
                "data": "full",
                "answers": CLUSTERS.get(k, ""),
                "cost": Cost(wall_s=600 + 3 * int(k), peak_memory_bytes=10**9, parameters=10**6 + 5000 * int(k)),
                "config": {"clustering.n_clusters": int(k), "seed": 0},
                "changed": {"clustering.n_clusters": 128},
                "manifest": Manifest(git="0123abc", packages={"torch": "2.15"}, hardware={"cpu": "two cores"}),
            }
        rows.append(row.model_copy(update=own))
    data = scores(fake.per_image, "demo")
    demo = Chapter(rank(rows, data, n_resamples=50), "How many clusters?", "", data, tuple(fake.galleries), fake.axis)
    metrics = {"PixCorr": Interval(mean=0.38, ci_low=0.37, ci_high=0.39), "CLIP": Interval(mean=0.95)}
    paper = [
        Row(
            method="Brain-IT",
            variant=f"transfer, {data}",
            track="paper",
            protocol="brain-it",
            protocol_hash="f" * 16,
            subjects=(1, 2, 5, 7),
            n_images=1000,
            metrics=metrics,
            source="here",
            data=data,
        )
        for data in ("1h", "15min")
    ]
    out = folder / "a site" / "board"
    build_report(out, [demo, Chapter(rank(paper), "Transfer")], title="All of it", about="Two leaderboards.")
    return SimpleNamespace(out=out, rows=rows, scores=data, ranking=demo.ranking)


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    if reason := why_not():
        pytest.skip(reason)
    with Chromium() as running:
        yield running
