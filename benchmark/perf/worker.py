"""``python -m benchmark.perf.worker``: one side of an entry, measured in a process of its own by the harness."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

from benchmark.perf import machine, usage
from benchmark.perf.entries import SIDES, Job, Module, Results

MACHINE = "machine"
REPORT, RESULTS = "report.json", "results.npz"


def main(argv: list[str] | None = None) -> int:
    """Measure, and leave the report and the results in the folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.perf.worker", description=__doc__)
    parser.add_argument("what", help=f"an entry's module, or '{MACHINE}'")
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    job = Job(args.quick, args.device, args.threads)
    if args.what == MACHINE:
        report = dataclasses.asdict(machine.measure(job.device, job.threads, quick=job.quick))
    else:
        report = _measure(args.what, args.side, job, args.folder)
    (args.folder / REPORT).write_text(json.dumps(report))
    return 0


def _measure(name: str, side: str, job: Job, folder: Path) -> dict[str, Any]:
    import numpy as np

    module = cast(Module, importlib.import_module(name))
    torch: Any = sys.modules.get("torch")  # not every entry needs it
    if torch is not None:
        torch.set_num_threads(job.threads)

    # What a library does on its first call (thread pools, buffers, imports of its own) is not what is compared.
    warm_up = dataclasses.replace(job, quick=True)
    for part in module.PARTS:
        if not part.starts_processes:
            getattr(part, side)(part.prepare(warm_up), warm_up)
    baseline = usage.resident()

    parts, results = [], Results()
    for part in module.PARTS:
        inputs = part.prepare(job)
        usage.reset_peak()
        if torch is not None and job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), usage.cpu_seconds()
        found = getattr(part, side)(inputs, job)
        if torch is not None and job.device == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, usage.cpu_seconds() - cpu
        if part.starts_processes:
            most = usage.peak_of_children()
        else:
            most = torch.cuda.max_memory_allocated() if job.device == "cuda" else usage.peak() - baseline
        del inputs
        results |= found
        spent = {"wall_s": wall, "cpu_s": cpu, "peak_bytes": max(most, 0)}
        floor = None if part.floor is None else dataclasses.asdict(part.floor(job))
        whole = None if part.whole is None else part.whole(job)
        parts.append({"part": part.name, **spent, "floor": floor, "whole": whole})
    np.savez(folder / RESULTS, **results)
    return {"parts": parts, "tolerances": dict(module.TOLERANCES)}


if __name__ == "__main__":
    sys.exit(main())
