"""What holds for every test: one thread, nobody's accounts, no network."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest

# Before any numerical library is imported: they read these once.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

# Whoever runs the tests may be logged in to W&B or Hugging Face: nothing is sent there, nothing is fetched.
os.environ.pop("WANDB_API_KEY", None)
os.environ |= {
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}

_patch = pytest.MonkeyPatch()
_reached: list[str] = []


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    own = {"", "localhost", "0.0.0.0", "::", "::1", socket.gethostname()}
    return host is None or host in own or str(host).startswith("127.")


def _refuse(host: object) -> None:
    """Record the attempt, so that code which survives being offline fails its test too."""
    _reached.append(str(host))
    raise ConnectionRefusedError(f"tests are offline: {host}")


def _guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guard(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            _refuse(address[0])
        return connect(self, address)

    return guard


def _guarded_lookup(lookup: Callable[..., Any]) -> Callable[..., Any]:
    def guard(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            _refuse(host)
        return lookup(host, *args, **kwargs)

    return guard


def pytest_configure() -> None:
    """Close the way out of this process, for fixtures of every scope; let Ctrl-C arrive where tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, which children inherit
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _patch.setattr(socket.socket, "connect", _guarded(socket.socket.connect))
    _patch.setattr(socket.socket, "connect_ex", _guarded(socket.socket.connect_ex))
    _patch.setattr(socket, "getaddrinfo", _guarded_lookup(socket.getaddrinfo))


def pytest_unconfigure() -> None:
    """Open it again."""
    _patch.undo()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Start every test with one thread: a command that an earlier one ran may have taken more, and sums round anew."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that tried to reach another machine, itself or in its fixtures."""
    try:
        result = yield
    finally:
        reached = sorted(set(_reached))
        _reached.clear()
    if reached:
        pytest.fail(f"{item.nodeid} tried to reach {', '.join(reached)}; tests are offline", pytrace=False)
    return result
