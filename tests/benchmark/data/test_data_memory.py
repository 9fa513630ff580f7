"""A subject of NSD's true size is prepared in little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmark.data import paths
from benchmark.data.prepared import PreparedData
from benchmark.data.release import NSD_RELEASE, Release

sys.path.insert(0, str(Path(__file__).parent))
from true_size import hollow_brick, hollow_mgh, place, write_design, write_masks

ROOT = Path(__file__).parents[3]
LIMIT_MB = 1500
"""Far below the 8 GB that are promised: what one session takes, whatever their number."""

_PREPARE = """
import json, resource, sys
from pathlib import Path
from benchmark.data.prepare import prepare
from benchmark.data.release import Release
release = json.loads(sys.argv[3])
release["sessions"] = {int(k): v for k, v in release["sessions"].items()}
release["voxels"] = {int(k): tuple(v) for k, v in release["voxels"].items()}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare(sys.argv[1], sys.argv[2], parts=["betas"], release=Release(**release))
print(before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def _fill(path: Path, seed: int) -> None:
    """Put numbers into a session: each trial another shift of the same noise, which is quickly written."""
    vertices, trials = NSD_RELEASE.vertices, NSD_RELEASE.trials_per_session
    noise = np.random.default_rng(seed).standard_normal(vertices + trials).astype(">f4")
    with path.open("r+b") as file:
        file.seek(284)
        for trial in range(trials):
            file.write(noise[trial : trial + vertices].tobytes())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sessions_of_true_size_take_little_memory_and_are_exact(tmp_path: Path) -> None:
    """Three sessions of 163,842 x 2 vertices and 750 trials, three gigabytes, 39,548 of them in use."""
    changes = dict(
        images=1500,
        image_side=8,
        shared=100,
        images_per_subject=750,
        trials_designed=2250,
        sessions={1: 3},
        voxels={1: NSD_RELEASE.voxels[1]},
    )
    release, tree = Release(**changes), tmp_path / "tree"  # type: ignore[arg-type]
    write_design(tree, release)
    write_masks(tree, release, [1])
    hollow_brick(place(tree, paths.STIMULI), (1500, 8, 8, 3))
    for side, hemisphere in enumerate(paths.HEMISPHERES):
        for session in (1, 2, 3):
            path = place(tree, paths.betas(1, hemisphere, session))
            hollow_mgh(path, release.vertices, release.trials_per_session)
            _fill(path, 10 * side + session)
    command = [sys.executable, "-c", _PREPARE, str(tree), str(tmp_path / "store"), json.dumps(changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    before, most = map(int, run.stdout.split())
    print(f"{before} MB after imports, {most} MB at most")
    assert most < LIMIT_MB
    data = PreparedData.open(tmp_path / "store")
    assert data.averaged(1).shape[1] == data.trial_betas(1).shape[1] == 39_548
    shown = data.trials(1).reshape(-1)
    ids, repeats = data.seen(1)
    assert (repeats == 3).all() and data.trial_betas(1).shape[0] == 2250
    columns = np.array([0, 19_003, 19_004, 39_547])  # first and last of each hemisphere
    plain = np.empty((2250, 4))
    for side, hemisphere in enumerate(paths.HEMISPHERES):
        vertices = np.flatnonzero(np.load(tree / paths.mask(1, hemisphere)))[[0, -1]]
        for session in (1, 2, 3):
            raw = np.memmap(tree / paths.betas(1, hemisphere, session), ">f4", "r", 284, (750, release.vertices))
            own = raw[:, vertices].astype(np.float64)
            plain[750 * (session - 1) : 750 * session, 2 * side : 2 * side + 2] = (own - own.mean(0)) / own.std(0)
    np.testing.assert_allclose(data.trial_betas(1)[:, columns], plain, rtol=2**-11 * 1.01, atol=1e-5)
    means = np.stack([plain[shown == image].mean(0) for image in ids])
    np.testing.assert_allclose(data.averaged(1)[:, columns], means, rtol=2**-11 * 1.01, atol=1e-5)
    shutil.rmtree(tree)  # three gigabytes
