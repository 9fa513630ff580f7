"""Stage folders on disk: atomic, verified, locked.

``root/<stage name>/<fingerprint[:16]>/`` holds ``config.yaml`` (what was asked), ``manifest.json`` (with what it was
made), ``status.json`` (how it went), ``tracking/`` (metrics over time), the outputs, while it runs ``checkpoints/``,
and ``DONE``, written last, with size and SHA-256 of every file that the result consists of. A folder without a valid
``DONE`` is not a result, whatever else lies in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from benchmark.errors import UserError
from benchmark.graph import Stage

DONE = "DONE"
CONFIG = "config.yaml"
MANIFEST = "manifest.json"
STATUS = "status.json"
TRACEBACK = "traceback.txt"
CHECKPOINTS = "checkpoints"
TRACKING = "tracking"

_LOCK_POLL_S = 0.2
# libyaml's loader is ten times as fast as the pure Python one, and comes with most wheels of PyYAML.
_YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class StageState:
    """What the store knows of a stage. ``detail`` names the error, the process, or the damaged file."""

    kind: Literal["absent", "running", "interrupted", "failed", "damaged", "done"]
    detail: str = ""
    resumable: bool = False  # a checkpoint is there to go on from


@dataclass(frozen=True)
class Attempt:
    """A folder made ready to compute in; ``previous`` is the status of the attempt that it resumes, if any."""

    folder: Path
    previous: dict[str, Any] | None


class Store:
    """The folder under which every stage keeps its result. Making the object touches nothing on disk."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def folder(self, stage: Stage) -> Path:
        """Return the folder of the stage's result (which may not exist)."""
        return self.root / stage.key

    def state(self, stage: Stage) -> StageState:
        """Say whether the stage has a good result, and if not, what is there; checks sizes, :meth:`verify` digests."""
        folder = self.folder(stage)
        if (folder / DONE).exists():
            damage = next(_damages(folder, stage, digests=False), None)
            return StageState("damaged", damage) if damage else StageState("done")
        holder = self.holder(stage)
        if holder:
            return StageState("running", _who(holder))
        status = self.status(stage)
        if not status:
            return StageState("absent")
        resumable = self.resumes(stage)
        if status.get("state") == "failed":
            return StageState("failed", str(status.get("error", "no error recorded")), resumable)
        # "running" without a lock: its process was killed. "done" without DONE: killed in the last moment.
        return StageState("interrupted", "", resumable)

    def is_done(self, stage: Stage) -> bool:
        """Return whether ``DONE`` exists and every output that it lists has the listed size."""
        folder = self.folder(stage)
        return (folder / DONE).exists() and next(_damages(folder, stage, digests=False), None) is None

    def verify(self, stage: Stage) -> list[str]:
        """Compare every output with its recorded SHA-256; return what is wrong, a line a file, or an empty list."""
        folder = self.folder(stage)
        return list(_damages(folder, stage, digests=True)) if (folder / DONE).exists() else [f"{DONE} (missing)"]

    def status(self, stage: Stage) -> dict[str, Any]:
        """Return the stage's ``status.json``, or an empty dict where there is none that can be read."""
        return _read_status(self.folder(stage))

    def finished(self, name: str) -> list[dict[str, Any]]:
        """Return the ``config.yaml`` of every finished stage of this name, the newest first."""
        dones = [path for path in (self.root / name).glob(f"*/{DONE}") if "." not in path.parent.name]
        records = []
        for done in sorted(dones, key=lambda path: path.stat().st_mtime, reverse=True):
            with contextlib.suppress(OSError, yaml.YAMLError):
                record = yaml.load((done.parent / CONFIG).read_text(), Loader=_YamlLoader)
                if isinstance(record, dict):
                    records.append(record)
        return records

    @contextlib.contextmanager
    def lock(self, stage: Stage, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the stage: one process at a time computes it.

        Waits for the holder, and tells ``on_wait`` once who that is. The kernel frees the lock of a process that dies,
        however it dies.

        Raises:
            UserError: the store cannot be written to, or its file system has no locks.
        """
        with self.hold(self._lock_path(stage), on_wait):
            yield

    @contextlib.contextmanager
    def hold(self, path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold a lock file of the store, as :meth:`lock` does a stage's."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("a+b", buffering=0)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.root}: {error.strerror}; choose another folder with --out DIR"
            ) from error
        with handle:
            tries = 0
            while not _try_lock(handle.fileno(), fcntl.LOCK_EX, self.root):
                tries += 1
                if tries == 2 and on_wait:  # by then the holder has signed, or was only a look by holder()
                    on_wait(_who(_read_holder(path)))
                time.sleep(_LOCK_POLL_S)
            # The lock files stay: to remove one would let two processes lock two files of one name.
            with contextlib.suppress(OSError):  # on a full disk the lock holds unsigned
                handle.truncate(0)
                handle.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now()}).encode())
            yield

    def holder(self, stage: Stage) -> dict[str, Any] | None:
        """Return ``{"host", "pid", "since"}`` of the process that holds the stage now, or None."""
        path = self._lock_path(stage)
        try:
            with path.open(encoding="utf-8") as handle:
                return None if _try_lock(handle.fileno(), fcntl.LOCK_SH, self.root) else _read_holder(path)
        except OSError:
            return None

    def resumes(self, stage: Stage, force: bool = False) -> bool:
        """Return whether the stage would go on from a checkpoint.

        A forced stage goes on only from a forced attempt that was interrupted: whoever forces wants none of the old
            state, but
        the same forced command, given again, must not start from nothing.
        """
        folder = self._workplace(stage, force)
        if not any(_entries(folder / CHECKPOINTS)):
            return False
        status = _read_status(folder)
        return not force or (status.get("forced") is True and status.get("state") != "failed")

    def begin(self, stage: Stage, force: bool = False) -> Attempt:
        """Make the folder ready to compute in; call it with the lock held.

        What an earlier attempt left is cleared, except status, checkpoints and tracking where it is resumed. A forced
        stage
        that has a result computes in a folder beside it: the old result stays whole, and in use, until the new one is.
        """
        folder = self._workplace(stage, force)
        resume = self.resumes(stage, force)
        previous = _read_status(folder) if resume else None
        _clear(folder, keep={STATUS, CHECKPOINTS, TRACKING} if resume else set())
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        return Attempt(folder, previous)

    def seal(self, stage: Stage, folder: Path) -> None:
        """Write ``DONE``: from here on the folder is a result.

        Raises:
            ValueError: an output is a link or a special file.
        """
        outputs = {}
        for path in _output_files(folder):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ValueError(
                    f"output {path.name} is not a plain file; a stage writes its outputs, it links to none"
                )
            name = path.relative_to(folder).as_posix()
            outputs[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        write_json(folder / DONE, {"fingerprint": stage.fingerprint, "finished": now(), "outputs": outputs})

    def publish(self, stage: Stage, folder: Path) -> None:
        """Put a sealed folder in its place and drop what it replaces; call it with the lock held."""
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        final = self.folder(stage)
        if folder != final:
            replaced = final.with_name(final.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():
                final.rename(replaced)
            folder.rename(final)
        for leftover in (".forced", ".replaced"):
            shutil.rmtree(final.with_name(final.name + leftover), ignore_errors=True)

    def recover(self, stage: Stage) -> None:
        """Finish a :meth:`publish` that was killed half-way; call it with the lock held."""
        final = self.folder(stage)
        forced = final.with_name(final.name + ".forced")
        if (forced / DONE).exists():
            self.publish(stage, forced)

    def discard_outputs(self, folder: Path) -> None:
        """Remove half-written outputs from an attempt that failed; what tells about the attempt stays."""
        _clear(folder, keep={CONFIG, MANIFEST, STATUS, CHECKPOINTS, TRACKING})

    def _workplace(self, stage: Stage, force: bool) -> Path:
        final = self.folder(stage)
        return final.with_name(final.name + ".forced") if force and self.is_done(stage) else final

    def _lock_path(self, stage: Stage) -> Path:
        return self.root / ".locks" / f"{stage.key.replace('/', '-')}.lock"


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself durable
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
        TypeError: something that JSON does not know.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """Write YAML atomically, keys in the order given."""
    write_text(path, yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=120))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _damages(folder: Path, stage: Stage, digests: bool) -> Iterator[str]:
    """Yield ``file (what is wrong with it)`` for everything that does not agree with ``DONE``."""
    try:
        done = read_json(folder / DONE)
        outputs = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in done["outputs"].items()}
        fingerprint = done["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield f"{DONE} (not readable)"
        return
    if fingerprint != stage.fingerprint:
        yield f"{DONE} (belongs to stage {str(fingerprint)[:16]})"
        return
    inside = folder.resolve()
    # One look-up a folder, not one a file: a stage may write thousands of images.
    parents: dict[PurePosixPath, bool] = {}
    for name, (size, digest) in outputs.items():
        relative = PurePosixPath(name)
        parent = relative.parent
        if parent not in parents:
            parents[parent] = (folder / parent).resolve().is_relative_to(inside)
        if relative.is_absolute() or ".." in relative.parts or not parents[parent]:
            yield f"{name} (outside the stage's folder)"
            continue
        path = folder / relative
        try:
            found = path.lstat()
        except OSError:
            yield f"{name} (missing)"
            continue
        if not stat.S_ISREG(found.st_mode):
            yield f"{name} (not a plain file)"
        elif found.st_size != size:
            yield f"{name} ({found.st_size} bytes, expected {size})"
        elif digests and sha256_file(path) != digest:
            yield f"{name} (SHA-256 differs)"


def _output_files(folder: Path) -> Iterator[Path]:
    """Everything that the result consists of: not the status, nor the tracking, which changes when it is synced."""
    skipped = {folder / name for name in (DONE, STATUS, CHECKPOINTS, TRACKING)}
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if Path(base, name) not in skipped)
        yield from (Path(base, name) for name in folders if Path(base, name).is_symlink())
        for name in sorted(files):
            path = Path(base, name)
            if path not in skipped and path.suffix != ".tmp":
                yield path


def _clear(folder: Path, keep: set[str]) -> None:
    for entry in _entries(folder):
        if entry.name in keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _read_status(folder: Path) -> dict[str, Any]:
    try:
        status = read_json(folder / STATUS)
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _try_lock(descriptor: int, kind: int, root: Path) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise UserError(
                f"{root} is on a file system without file locks ({error.strerror}), which keep two processes apart;\n"
                "choose a folder on another one with --out DIR"
            ) from error
        raise
    return True


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        holder = read_json(path)
    except (OSError, ValueError):
        return {}  # caught between taking the lock and signing it
    return holder if isinstance(holder, dict) else {}


def _who(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
