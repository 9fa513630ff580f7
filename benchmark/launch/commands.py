"""``python -m benchmark.sweep status|logs|cancel|retry|sync``: their options, and what they print."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from benchmark.cli import Parser
from benchmark.errors import RunError, UserError, did_you_mean
from benchmark.launch import control, queue, submissions
from benchmark.launch.control import Row, Status
from benchmark.launch.submissions import Submission
from benchmark.launch.table import table
from benchmark.store import TRACKING, Store
from benchmark.sweeps import own_file, sweep_names

SUMMARIES = {
    "status": "how the stages of a submitted sweep stand; without a name, what was submitted",
    "logs": "what the jobs of a sweep, or of some of its stages, printed",
    "cancel": "stop the jobs of a sweep, or of some of its stages",
    "retry": "submit again what failed, was cancelled or got lost, and what that held up",
    "sync": "upload the offline W&B runs of a sweep's stages",
}
_STAGE = "a stage by title ('lowlevel [clusters=8]'), name, label, folder or job"
_POLL_S = 1.0
_DEFAULT_OUT = Path("runs")


def parser(command: str) -> Parser:
    """Return the parser of one of the commands."""
    p = Parser(
        prog=f"python -m benchmark.sweep {command}",
        description=f"{SUMMARIES[command][0].upper()}{SUMMARIES[command][1:]}.",
        epilog="exit codes: 0 fine, 1 something failed on the way, 2 the call or its input is wrong",
    )
    p.add_argument(
        "sweep", metavar="SWEEP", nargs="?" if command == "status" else None, help="its name, or the id of a submission"
    )
    if command in ("logs", "cancel", "retry"):
        p.add_argument("stages", metavar="STAGE", nargs="*", help=_STAGE)
    p.add_argument(
        "--out", type=Path, default=_DEFAULT_OUT, metavar="DIR", help="folder of the results (default: runs)"
    )
    p.add_argument("--json", action="store_true", help="print JSON")
    if command == "status":
        p.add_argument("--all", action="store_true", help="every stage, however many there are")
        p.add_argument("--wait", action="store_true", help="follow the jobs until none waits or runs")
    if command == "logs":
        p.add_argument(
            "--lines", type=int, default=30, metavar="N", help="last lines of each log; 0 for all (default: 30)"
        )
        p.add_argument("--follow", action="store_true", help="print what is added, until the stages have ended")
    if command in ("cancel", "retry", "sync"):
        p.add_argument("--dry-run", action="store_true", help="say what would be done; do nothing")
    if command == "retry":
        p.add_argument("--wait", action="store_true", help="follow the jobs until none waits or runs, then report")
    return p


def run(command: str, arguments: Sequence[str]) -> int:
    """Run one of the commands; return its exit code.

    Raises:
        UserError, RunError: see :func:`benchmark.cli.main_guard`.
    """
    args = parser(command).parse_args(arguments)
    file = own_file(args.sweep or "")
    args.known = file is not None
    args.sweep = args.sweep if file is None else file.stem
    store = Store(args.out / "store")
    return _COMMANDS[command](args, store)


def _find(args: argparse.Namespace, store: Store) -> Submission:
    """Return the submission that is meant; what lies in the store where the sweep ran without Slurm."""
    try:
        return submissions.find(store, args.sweep)
    except UserError:
        known = [*sweep_names(), "run"]
        if submissions.history(store):
            raise
        if args.sweep not in known and not args.known:
            near = did_you_mean(args.sweep, known) or f"; choose from {', '.join(known)}"
            raise UserError(f"unknown sweep '{args.sweep}'{near}") from None
        return control.unsubmitted(store, args.sweep)


def _report(args: argparse.Namespace, store: Store, submission: Submission | None = None) -> Status:
    submission = submission or _find(args, store)
    return control.report(store, submission, args.sweep, _out(args))


def _submitted(args: argparse.Namespace, store: Store) -> Status:
    """The state of a sweep that was submitted.

    Raises:
        UserError: it was not.
    """
    status = _report(args, store)
    if not status.submission.id:
        raise UserError(
            f"sweep {args.sweep} was not submitted from {args.out}; its own command goes on where it stopped: "
            f"python -m benchmark.sweep {args.sweep}, with its other options"
        )
    return status


def _out(args: argparse.Namespace) -> str:
    return "" if args.out == _DEFAULT_OUT else str(args.out)


def _json(value: Any) -> int:
    print(json.dumps(value, indent=2, ensure_ascii=False))
    return 0


# --- status -----------------------------------------------------------------------------------------------------------


def _status(args: argparse.Namespace, store: Store) -> int:
    if args.sweep is None:
        return _history(args, store)
    submission = _find(args, store)
    code = 0
    if args.wait and submission.id:
        # The table is for people, on stderr where the answer is JSON.
        stream = sys.stderr if args.json else sys.stdout
        code = control.follow(store, submission, args.sweep, _out(args), stream)
    status = _report(args, store, submission)
    if args.json:
        _json(status.as_json())
    else:
        print("\n".join(table(status, args.all)))
    return code


def _history(args: argparse.Namespace, store: Store) -> int:
    records = submissions.history(store)
    if args.json:
        return _json(
            [
                {
                    "id": one.id,
                    "sweep": one.sweep,
                    "created": one.created,
                    "stages": len(one.stages),
                    "command": one.command,
                }
                for one in records
            ]
        )
    if not records:
        print(f"nothing was submitted from {args.out}; type: python -m benchmark.sweep NAME --launcher slurm")
    for one in records:
        print(f"{one.id:<32} {one.created[:16].replace('T', ' ')} UTC  {len(one.stages):>5,} stages  {one.command}")
    return 0


# --- logs -------------------------------------------------------------------------------------------------------------


def _logs(args: argparse.Namespace, store: Store) -> int:
    if args.lines < 0:
        raise UserError(f"--lines {args.lines}: expected 0 or more")
    status = _submitted(args, store)
    rows = control.select(status, args.stages) if args.stages else list(status.rows)
    if args.json:
        return _json(
            [
                {
                    "stage": row.stage.title,
                    "state": row.state,
                    "job": row.stage.job,
                    "files": [str(f) for f in _files(row)],
                }
                for row in rows
            ]
        )
    written = [row for row in rows if _files(row)]
    if args.follow:
        return _follow_logs(args, store, [row.stage.fingerprint for row in rows])
    if not written:
        for row in rows[:1] if args.stages else []:
            where = f"it is {row.state}" + (f": {row.reason}" if row.reason else "")
            print(f"{row.stage.title} has printed nothing: {where}")
        if not args.stages:
            print(f"no job of {status.submission.id} has printed anything yet")
        return 0
    if not args.stages:
        # What went wrong is what one looks for; the rest by name.
        bad = [row for row in written if row.state in control.ENDED_BADLY or row.state == "running"]
        for row in written:
            if row not in bad:
                print(f"{row.state:<11}  {row.stage.title:<32}  {_near(_files(row)[0])}")
        written = bad
    for row in written:
        for file in _files(row):
            print(f"==> {row.stage.title} ({row.state}): {_near(file)} <==")
            sys.stdout.writelines(_tail(file, args.lines))
    return 0


def _files(row: Row) -> list[Path]:
    """Return the logs of a stage that hold anything: of each of its tasks, what went wrong last."""
    if not row.stage.stderr:
        return []
    folder = Path(row.stage.stderr).parent
    found = [path for end in ("out", "err") for path in folder.glob(f"{row.stage.job}_*_log.{end}")]
    # "12_*" is also the beginning of 12_3_0_log.out; a job is either an array or not, so its own names have one part.
    parts = row.stage.job.count("_") + 3
    return [path for path in sorted(found, key=_task) if path.name.count("_") + 1 == parts and path.stat().st_size]


def _task(path: Path) -> tuple[str, int]:
    task = path.stem.split("_")[-2]
    return path.suffix == ".err" and "1" or "0", int(task) if task.isdigit() else 0


def _tail(file: Path, lines: int) -> Iterator[str]:
    with file.open(encoding="utf-8", errors="replace") as text:
        if lines:
            # A progress line is about 100 bytes; twice that is plenty, and a log may have gigabytes.
            size = file.stat().st_size
            start = max(0, size - 400 * lines - 4096)
            if start:
                text.seek(start)
                text.readline()
            kept = text.read().splitlines(keepends=True)[-lines:]
        else:
            kept = text.readlines()
    yield from kept
    if kept and not kept[-1].endswith("\n"):
        yield "\n"


def _follow_logs(args: argparse.Namespace, store: Store, wanted: Sequence[str]) -> int:
    """Print what is added to the logs of some stages until they have ended."""
    submission = submissions.find(store, args.sweep)
    watch = control.Watch()
    opened: dict[Path, IO[str]] = {}
    last: Path | None = None
    with contextlib.ExitStack() as stack:
        while True:
            status = control.report(store, submission, args.sweep, _out(args), watch)
            rows = [row for row in status.rows if row.stage.fingerprint in wanted]
            for row in rows:
                for file in _files(row):
                    if file not in opened:
                        opened[file] = stack.enter_context(file.open(encoding="utf-8", errors="replace"))
                        if args.lines:
                            opened[file].seek(max(0, file.stat().st_size - 200 * args.lines))
                    if added := opened[file].read():
                        if file != last:
                            print(f"==> {row.stage.title}: {_near(file)} <==")
                            last = file
                        print(added, end="", flush=True)
            if not any(row.state in ("running", "queued") for row in rows):
                break
            time.sleep(_POLL_S)
    return 0


def _near(path: Path) -> str:
    """A path as people would type it here."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


# --- cancel and retry -------------------------------------------------------------------------------------------------


def _cancel(args: argparse.Namespace, store: Store) -> int:
    status = _submitted(args, store)
    found = control.to_cancel(store, status, args.stages)
    if found.jobs and not args.dry_run:
        control.cancel(store, status, found.jobs)
    if args.json:
        return _json(
            {
                "cancelled": [
                    {"stage": row.stage.title, "key": row.stage.key, "job": row.stage.job} for row in found.jobs
                ],
                "kept": [row.stage.title for row in found.kept],
                "holds_up": [row.stage.title for row in found.holds_up],
                "dry_run": args.dry_run,
            }
        )
    if not found.jobs and not found.kept:
        print(f"nothing to cancel: no job of {_these(args)} waits or runs")
        return 0
    running = sum(row.state == "running" for row in found.jobs)
    verb = "would cancel" if args.dry_run else "cancelled"
    print(f"{verb} {_many(len(found.jobs), 'job')} ({running:,} running)")
    _list(found.jobs, lambda row: row.stage.job)
    if found.holds_up:
        print(f"that holds up {_many(len(found.holds_up), 'stage')}:")
        _list(found.holds_up, lambda row: row.stage.job)
    if found.kept:
        print(f"{_many(len(found.kept), 'job')} of stages that another submission waits for, or computes, go on:")
        _list(found.kept, lambda row: row.stage.job)
        print("  name a stage to cancel its job all the same")
    if found.jobs and not args.dry_run:
        print(f"go on from there: {status.command('retry')}")
    return 0


def _retry(args: argparse.Namespace, store: Store) -> int:
    status = _submitted(args, store)
    rows = control.to_retry(status, args.stages)
    told = [{"stage": row.stage.title, "key": row.stage.key, "state": row.state} for row in rows]
    if args.dry_run or not rows:
        if args.json:
            return _json({"retried": told, "submission": None, "dry_run": args.dry_run})
        if not rows:
            print(f"nothing to retry: {', '.join(f'{count:,} {state}' for state, count in status.counts.items())}")
        else:
            print(f"would submit {_many(len(rows), 'stage')}:")
            _list(rows, lambda row: f"{row.state}: {row.error or row.reason}")
        return 0
    if not queue.available():
        raise UserError(
            f"sbatch is not on the PATH: retry on a node that may submit jobs, or here: {status.submission.command} "
            "--launcher inline"
        )
    # What the submission prints is for people.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        code = _submit_again(args, status.submission, [row.stage.fingerprint for row in rows])
    if args.json:
        _json({"retried": told, "submission": submissions.find(store, status.submission.sweep).id, "dry_run": False})
    return code


def _submit_again(args: argparse.Namespace, submission: Submission, fingerprints: Sequence[str]) -> int:
    """Plan the very same variants again and submit some of their stages.

    Raises:
        UserError: the variants' stages are no longer the ones that were submitted, or as for the sweep's command.
    """
    from benchmark.running import restore_arguments, run_sweep, sweep_of

    saved = restore_arguments(submission.arguments)
    saved.out, saved.launcher, saved.wait, saved.dry_run = args.out, "slurm", args.wait, False
    # Done is done, but for what was to be computed again and was not.
    saved.mode = "force" if saved.mode == "force" else "cached"
    return run_sweep(sweep_of(saved), saved, only=fingerprints, command=submission.command)


# --- sync -------------------------------------------------------------------------------------------------------------


def _sync(args: argparse.Namespace, store: Store) -> int:
    from benchmark.tracking.board import board_folder
    from benchmark.tracking.sync import Uploaded, is_waiting, offline_runs, require_key, upload

    status = _report(args, store)
    running = [row for row in status.rows if row.state == "running"]
    busy = {row.stage.key for row in running}
    # A stage that several submissions know is looked at once; stages of older submissions of the sweep count, too.
    titles = {row.stage.key: row.stage.title for row in status.rows}
    if status.submission.id == "" or args.sweep == status.submission.sweep:
        for record in submissions.history(store):
            if record.sweep == args.sweep:
                titles = {**{one.key: one.title for one in record.stages}, **titles}
    found = [
        offline_runs(title, folder / TRACKING)
        for key, title in titles.items()
        if key not in busy
        for folder in (store.root / key, store.root / f"{key}.forced")
        if (folder / TRACKING).is_dir()
    ]
    boards = board_folder(args.out, status.submission.sweep).glob("*")
    found += [offline_runs(f"leaderboard [{status.submission.sweep}]", folder) for folder in sorted(boards)]
    waiting = sum(len(one.waiting) for one in found)
    synced = sum(len(one.synced) for one in found)
    if waiting and not args.dry_run:
        require_key()
    report: dict[str, Any] = {
        "waiting": waiting,
        "synced_before": synced,
        "running": [row.stage.title for row in running],
        "dry_run": args.dry_run,
        "stages": [{"stage": one.title, "runs": [str(path) for path in one.waiting]} for one in found if one.waiting],
    }
    if not args.json:
        verb = "would upload" if args.dry_run else "to upload"
        runs = f"{_many(waiting, 'offline run')} of {_many(sum(bool(one.waiting) for one in found), 'stage')}"
        print(f"{verb}: {runs}; {synced:,} uploaded before")
        if running:
            print(f"{_many(len(running), 'stage')} still running: upload them later, with the same command")
    if args.dry_run:
        if args.json:
            return _json(report)
        for one in found:
            for path in one.waiting:
                print(f"  {one.title}: {_near(path.parent.absolute())}")
        return 0

    def told(one: Uploaded) -> None:
        if not args.json:
            good = f"{_many(one.done, 'run')} uploaded" if one.done else ""
            print(f"  {one.runs.title}: {'; '.join(part for part in (good, one.error) if part)}", flush=True)

    with store.hold(submissions.folder(store).parent / "sync.lock") if waiting else contextlib.nullcontext():
        # Looked at again with the lock held: another sync may have uploaded some.
        again = [replace(one, waiting=tuple(filter(is_waiting, one.waiting))) for one in found]
        results = upload(again, told)
    bad = [one for one in results if one.error]
    report |= {
        "uploaded": sum(one.done for one in results),
        "failed": [{"stage": one.runs.title, "error": one.error} for one in bad],
    }
    if args.json:
        _json(report)
    if bad:
        left = sum(len(one.runs.waiting) - one.done for one in bad)
        raise RunError(
            f"{_many(left, 'run')} of {_many(len(bad), 'stage')} not uploaded; the same command tries them again"
        )
    return 0


# --- words ------------------------------------------------------------------------------------------------------------


def _these(args: argparse.Namespace) -> str:
    return ", ".join(args.stages) if args.stages else args.sweep


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _list(rows: Sequence[Row], detail: Callable[[Row], str], few: int = 20) -> None:
    for row in rows[:few]:
        print(f"  {row.stage.title}  {detail(row)}".rstrip())
    if len(rows) > few:
        print(f"  and {len(rows) - few:,} more")


_COMMANDS: dict[str, Callable[[argparse.Namespace, Store], int]] = {
    "status": _status,
    "logs": _logs,
    "cancel": _cancel,
    "retry": _retry,
    "sync": _sync,
}
