"""Download weights files: resumed where they stopped, checked, and in their place only when whole. Needs no torch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from benchmark.errors import RunError
from benchmark.progress import Progress
from benchmark.weights import Download

_CHUNK = 1 << 20
_TIMEOUT_S = 30
_ATTEMPTS = 4  # in a row that bring nothing


class UnreachableError(RunError):
    """The server does not answer: the next file of another server may not arrive either."""


class _CutError(Exception):
    """No answer, or one that ended before the file did; trying again may help."""


def fetch(download: Download, folder: Path, progress: Progress, pause_s: float = 2.0) -> str:
    """Download one file into ``folder``, unless it is there; return its SHA-256.

    What has arrived waits in ``FILE.part``, and the same call goes on from there.

    Args:
        download: what, and from where.
        folder: where to; made where it does not exist.
        progress: shows a bar.
        pause_s: before the next attempt when the connection broke; twice as long each time.

    Raises:
        UnreachableError: no answer; what has arrived is kept.
        RunError: the server refuses, the file cannot be written, or it is not the one that was published (then it is
            thrown away).
    """
    target = folder / download.file
    if target.exists():
        return _checked(download, target, _digest(target))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _own(target.with_name(target.name + ".part")) as part:
            _receive(download, target, part, progress, pause_s)
            digest = _digest(Path(part.name))
            if download.is_published(digest) is False:
                os.unlink(part.name)
                raise RunError(
                    f"{download.url}: what arrived is not the published file (SHA-256 {digest[:12]}..., expected "
                    f"{download.sha256[:12]}...) and was thrown away;\ntype the same command to try again, or copy the "
                    f"file here by hand: {target}"
                )
            os.fsync(part.fileno())
            os.replace(part.name, target)
    except OSError as error:
        raise RunError(f"{error.filename or target}: cannot be written ({error.strerror or error})") from error
    return digest


def _checked(download: Download, target: Path, digest: str) -> str:
    if download.is_published(digest) is False:
        raise RunError(
            f"{target}: there already, but not the published file (SHA-256 {digest[:12]}..., expected "
            f"{download.sha256[:12]}...); it was left as it is\nmove it away to fetch the published one"
        )
    return digest


@contextlib.contextmanager
def _own(part: Path) -> Iterator[BinaryIO]:
    """Open the unfinished file for this process alone."""
    with part.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{part}: another process is downloading it; wait for it, or end it first") from None
        try:
            yield file
        finally:
            if file.tell() == 0:  # nothing to go on from
                part.unlink(missing_ok=True)


def _receive(download: Download, target: Path, part: BinaryIO, progress: Progress, pause_s: float) -> None:
    """Fill ``part`` to its end, over as many connections as it takes."""
    failures = 0
    while True:
        before = part.seek(0, os.SEEK_END)
        try:
            return _go_on(download, part, progress)
        except urllib.error.HTTPError as error:
            raise RunError(
                f"{download.url}: the server answers {error.code} {error.reason};\n"
                f"if the file can be had elsewhere, copy it here: {target}"
            ) from error
        except _CutError as error:
            arrived = part.seek(0, os.SEEK_END)
            failures = 0 if arrived > before else failures + 1
            unknown = isinstance(getattr(error.__cause__, "reason", None), socket.gaierror)  # of a name; it stays so
            if failures == _ATTEMPTS or unknown:
                kept = f" {arrived / 1e6:.0f} MB are kept, and the same command goes on from there;" if arrived else ""
                raise UnreachableError(
                    f"{download.url}: not received ({error});{kept}\n"
                    f"without internet here, download that address on another machine and copy it to {target}"
                ) from error
            time.sleep(pause_s * 2 ** max(failures - 1, 0))


def _go_on(download: Download, part: BinaryIO, progress: Progress) -> None:
    """Ask for what is missing from ``part``, and append it.

    Raises:
        _CutError: there is no answer, or it ended too early.
        urllib.error.HTTPError: the server refuses.
        OSError: the file cannot be written.
    """
    have = part.seek(0, os.SEEK_END)
    headers = {"User-Agent": "brain-it-bench", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        answer = urllib.request.urlopen(urllib.request.Request(download.url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        if _total(error.headers.get("Content-Range")) == have:
            return  # nothing is missing
        part.truncate(0)  # it is longer than the file: of another one
        raise _CutError("the file at this address has changed") from error
    except (OSError, http.client.HTTPException) as error:
        raise _cut(error) from error
    with answer:
        place = answer.headers.get("Content-Range")
        if answer.status == http.HTTPStatus.PARTIAL_CONTENT and _start(place) == have:
            total = _total(place)
        elif answer.status == http.HTTPStatus.PARTIAL_CONTENT:
            part.truncate(0)
            raise _CutError("the server sent another part than the one asked for")
        else:  # it sends the whole only
            part.truncate(0)
            have, length = 0, answer.headers.get("Content-Length")
            total = int(length) if length else None
        with progress.bar(f"{download.file}, {download.megabytes:.0f} MB", total, have, share=True) as bar:
            while chunk := _read(answer):
                part.write(chunk)
                bar.advance(len(chunk))
    if total is not None and part.seek(0, os.SEEK_END) < total:
        raise _CutError("the connection was cut")
    part.flush()


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _cut(error) from error


def _cut(error: OSError | http.client.HTTPException) -> _CutError:
    reason = getattr(error, "reason", error)
    return _CutError(getattr(reason, "strerror", None) or str(reason) or type(error).__name__)


def _total(content_range: str | None) -> int | None:
    found = re.search(r"/(\d+)$", content_range or "")
    return int(found[1]) if found else None


def _start(content_range: str | None) -> int | None:
    found = re.match(r"bytes (\d+)-", content_range or "")
    return int(found[1]) if found else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
