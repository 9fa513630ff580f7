"""One stage in several processes that train together, one on each GPU, on one machine or on several.

Every process is a task of one job (submitit's, local or Slurm's). The first does what a stage's process always does:
lock, folder, status, results. The others run the stage's function beside it and keep nothing: the training loop's
processes share batches and gradients (``benchmark.training``), and only the first one's results are the stage's.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmark.errors import RunError
from benchmark.execute import Outcome, RunOptions, execute, execute_beside
from benchmark.graph import Stage
from benchmark.store import Store

_PATIENCE = timedelta(days=7)  # the first process may wait for a lock
_MEETING = timedelta(minutes=10)  # until all of them are there


def execute_together(stage: Stage, store: Store, options: RunOptions) -> Outcome | None:
    """Run ``stage`` as one of the processes of a job.

    Returns:
        How the stage ended, in the first process; None in the others.

    Raises:
        UserError, RunError: as :func:`benchmark.execute.execute`; in the others too where the first has given up.
    """
    with _group(options) as (rank, device):
        options = replace(options, device=device)
        if rank == 0:
            told = [False]

            def ready(folder: Path) -> None:
                _tell(str(folder))
                told[0] = True

            try:
                return execute(stage, store, options, ready=ready)
            finally:
                if not told[0]:  # cached, or refused: the others need not wait
                    _tell(None)
        folder = _hear()
        if folder is None:
            return None
        scratch = Path(tempfile.mkdtemp(prefix="beside-"))
        try:
            execute_beside(stage, store, options, Path(folder), scratch)
        except Exception as error:
            raise RunError(f"stage {stage.title} failed in process {rank}: {type(error).__name__}: {error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return None


@contextmanager
def _group(options: RunOptions) -> Iterator[tuple[int, str]]:
    """Join the job's processes; give out this one's number and device."""
    from submitit.helpers import TorchDistributedEnvironment

    place = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    address = _address(place.master_addr)
    os.environ["MASTER_ADDR"] = address
    import torch

    gpu = options.device.startswith("cuda")
    if gpu:
        torch.cuda.set_device(place.local_rank)
    try:
        meeting = torch.distributed.TCPStore(
            address, place.master_port, place.world_size, is_master=place.rank == 0, timeout=_MEETING
        )
    except RuntimeError as error:
        raise RunError(
            f"the {place.world_size} processes of this job cannot meet at {address}:{place.master_port}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo", store=meeting, rank=place.rank, world_size=place.world_size, timeout=_PATIENCE
    )
    try:
        yield place.rank, f"cuda:{place.local_rank}" if gpu else options.device
    finally:
        torch.distributed.destroy_process_group()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


def _address(host: str) -> str:
    """Where the first process is: its node by name, or by the address that Slurm knows where the name is no host's."""
    try:
        socket.gethostbyname(host)
    except OSError:
        # Slurm starts the tasks from the first node, where the batch script runs.
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return host


def _tell(folder: str | None) -> None:
    import torch

    torch.distributed.broadcast_object_list([folder])


def _hear() -> Any:
    import torch

    heard: list[Any] = [None]
    torch.distributed.broadcast_object_list(heard)
    return heard[0]
