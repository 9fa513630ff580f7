"""Submit a plan to Slurm: one array for each kind of stage and what it asks for, Slurm's dependencies between them.

Nothing of it stays in this process: jobs find their inputs in the store and leave their results there, the record of
the submission (``benchmark.launch.submissions``) says which job computes which stage. submitit writes the batch
scripts, submits them, and starts a job again after a preemption or its time limit.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths

from benchmark.errors import UserError, did_you_mean
from benchmark.execute import RunOptions
from benchmark.graph import Decision, Mode, Plan, Stage
from benchmark.launch import queue, submissions
from benchmark.launch.arrays import Array, Item, make_arrays
from benchmark.launch.job import StageJob, code_revision
from benchmark.launch.profile import FILE, FOLDER, STAGES, Ask, Profile, ask
from benchmark.launch.submissions import Submission, SubmittedStage
from benchmark.store import Store, now
from benchmark.weights import FOLDER_VARIABLE
from metrics.added import VARIABLE as EXTENSIONS_VARIABLE

# A training may reach its time limit many times before it is done; each time it has written a checkpoint.
_RESTARTS = 100_000
# Words of the user's that stand for what a profile does not say. sbatch takes others before those of the script.
_KEPT = {"partition", "account", "qos", "constraint", "reservation"}


@dataclass(frozen=True)
class Request:
    """What a command asks for.

    Attributes:
        sweep: name of the sweep.
        command: what was typed.
        out: folder of ``--out``.
        arguments: the command's options, as JSON.
        only: fingerprints of the stages to submit, with what they still need; None for all.
    """

    sweep: str
    command: str
    out: Path
    arguments: Mapping[str, Any]
    only: Collection[str] | None = None


class SlurmLauncher:
    """Submits plans to the cluster that ``sbatch`` on the PATH belongs to.

    Args:
        profile: of the cluster.
        parallel: how many stages of one array run at a time at most; None for as many as the cluster gives.
        device: ``cpu``, ``cuda``, or ``auto`` for what profile and stage say.
        threads: of a task; as many as it has cores where None.
        source: the profile's file, for people; None where there is none.
    """

    def __init__(
        self,
        profile: Profile,
        parallel: int | None = None,
        device: str = "auto",
        threads: int | None = None,
        source: Path | None = None,
    ) -> None:
        self._profile = profile
        self._parallel = parallel
        self._device = device
        self._threads = threads
        self._source = str(source) if source is not None else f"a profile (~/.config/{FOLDER}/{FILE}, or --profile)"

    def ask(self, stage: Stage) -> Ask:
        """Return what ``stage`` asks of the cluster; see :func:`benchmark.launch.profile.ask`."""
        return ask(self._profile, stage, self._device)

    def problems(self, stages: Sequence[Stage]) -> list[str]:
        """Return what keeps ``stages`` from being submitted, a line each."""
        source = self._source
        known = {*STAGES, *(stage.name for stage in stages)}
        found: dict[str, None] = {}
        for name in self._profile.stages:
            if name not in known:
                hint = did_you_mean(name, known) or f"; there are {', '.join(sorted(known))}"
                found[f"slurm: {source}: stages: no stage '{name}'{hint}"] = None
        if not queue.available():
            found["slurm: sbatch is not on the PATH; type this on a node of the cluster that may submit jobs"] = None
            return list(found)
        try:
            there = queue.partitions()
        except UserError as error:
            found[f"slurm: {error}"] = None
            return list(found)
        default = next((name for name, info in there.items() if info.default), None)
        slow: dict[tuple[str, int, int], dict[str, None]] = {}
        for stage in stages:
            try:
                wanted = self.ask(stage)
            except UserError as error:
                found[f"slurm: {source}: {str(error).removeprefix('profile: ')}"] = None
                continue
            named = wanted.partition or os.environ.get("SBATCH_PARTITION") or default
            if named is None:
                found[f"slurm: the cluster has no default partition; say partition: NAME in {source}"] = None
                continue
            names = [name.strip() for name in named.split(",")]
            for name in names:
                if name not in there:
                    hint = did_you_mean(name, there)
                    known_ones = ", ".join(sorted(there))
                    found[f"slurm: no partition '{name}'{hint} ({source}); the cluster has {known_ones}"] = None
            limits = [there[name].max_minutes for name in names if name in there]
            finite = [limit for limit in limits if limit is not None]
            if finite and len(finite) == len(limits) and wanted.minutes > max(finite):
                slow.setdefault((named, wanted.minutes, max(finite)), {})[stage.name] = None
        for (named, minutes, limit), names_of in slow.items():
            ones = ", ".join(names_of)
            found[
                f"slurm: {ones}: {_hours(minutes)} h asked for, partition {named} allows {_hours(limit)} h; say "
                f"hours: {_hours(limit)} in {source} (a job that reaches its limit goes on in a new one)"
            ] = None
        return list(found)

    def submit(
        self,
        plan: Plan,
        mode: Mode | str,
        store: Store,
        options: RunOptions,
        request: Request,
        note: Callable[[str], None] = lambda line: None,
    ) -> tuple[Submission, int]:
        """Submit what has no result and no live job, and record it; return the record and how many were submitted.

        Stages that another submission's live job computes are waited for, not submitted again. Where nothing is left to
        submit, the newest submission that covers the plan is returned, or a record that names the others' jobs.

        Args:
            plan: of the sweep.
            mode: what to do with results that exist, or do not.
            store: of the results; its folder must be the same on all nodes.
            options: how to run; device, threads, processes and force are set for each stage.
            request: what was asked for.
            note: is told what this waits for.

        Raises:
            UserError: Slurm refuses jobs or does not answer, or the store cannot be written to; then nothing stays
                submitted.
        """
        with submissions.submit_lock(store, lambda holder: note(f"waits for {holder}, which submits to this store")):
            decisions = plan.decide(store, mode)
            wanted = _wanted(decisions, request.only, store)
            shared = _shared(store, wanted)
            new = [decision for decision in wanted if decision.stage.fingerprint not in shared]
            if not new:
                covering = _covering(store, request.sweep, shared)
                if covering is not None:
                    return covering, 0
            identifier = submissions.new_id(store, request.sweep)
            folder = submissions.logs(store, identifier)
            jobs: dict[str, str] = {}
            try:
                for array, ids in self._submit(new, shared, store, options, request, folder):
                    jobs.update(zip(array.members, ids, strict=True))
                record = self._record(identifier, decisions, wanted, jobs, shared, folder, request)
                submissions.write(store, record)
            except BaseException as error:
                with contextlib.suppress(UserError):
                    queue.cancel({queue.base_id(job) for job in jobs.values()})
                if isinstance(error, OSError):
                    raise UserError(
                        f"cannot write to {store.root}: {error.strerror}; nothing was submitted, "
                        f"make room there or choose another folder with --out DIR"
                    ) from error
                raise
            return record, len(jobs)

    def _submit(
        self,
        new: Sequence[Decision],
        shared: Mapping[str, SubmittedStage],
        store: Store,
        options: RunOptions,
        request: Request,
        folder: Path,
    ) -> Iterator[tuple[Array, list[str]]]:
        if not new:
            return
        arrays, asks = self.arrays(new, set(shared), queue.max_array_size())
        by_fingerprint = {decision.stage.fingerprint: decision for decision in new}
        options = replace(options, command=options.command or request.command)
        revision = code_revision()
        ids: list[list[str]] = []
        for array in arrays:
            first = by_fingerprint[array.members[0]].stage
            wanted = asks[first.fingerprint]
            threads = self._threads or wanted.cpus
            own = replace(options, device=wanted.device, threads=threads, processes=wanted.tasks, position="")
            tasks = [
                StageJob(
                    decision.stage.to_dict(),
                    str(store.root.absolute()),
                    asdict(replace(own, force=decision.force)),
                    revision,
                    60 * wanted.minutes - wanted.signal_seconds,
                )
                for decision in (by_fingerprint[member] for member in array.members)
            ]
            dependency = dependency_words(array, ids, {key: stage.job for key, stage in shared.items()})
            executor = self._executor(folder, wanted, f"{request.sweep}.{first.name}", dependency, array.throttle)
            with _clean_environment(wanted):
                try:
                    submitted = executor.submit_array(tasks)
                except (FailedJobError, FailedSubmissionError) as error:
                    raise UserError(
                        f"Slurm refuses the jobs of stage {first.name}, which ask for {wanted.words()}: {_said(error)}"
                    ) from None
            ids.append([job.job_id for job in submitted])
            yield array, ids[-1]

    def render(
        self, decisions: Sequence[Decision], arrays: Sequence[Array], asks: Mapping[str, Ask], folder: Path
    ) -> list[str]:
        """Return the batch scripts of the arrays, with 1, 2, ... in the place of the jobs' numbers; asks nobody."""
        names = {decision.stage.fingerprint: decision.stage.name for decision in decisions}
        scripts: list[str] = []
        ids: list[list[str]] = []
        for number, array in enumerate(arrays, 1):
            first = array.members[0]
            dependency = dependency_words(array, ids, {})
            executor = self._executor(folder, asks[first], names[first], dependency, array.throttle)
            count = len(array.members)
            scripts.append(script(executor, count))
            ids.append([f"{number}_{index}" for index in range(count)] if count > 1 else [str(number)])
        return scripts

    def plan_lines(self, decisions: Sequence[Decision]) -> list[str]:
        """Return what :meth:`submit` would submit, for people; asks nobody."""
        arrays, asks = self.arrays(decisions)
        title = {decision.stage.fingerprint: decision.stage for decision in decisions}
        lines = [f"as {_many(len(arrays), 'job')} of Slurm:"] if arrays else []
        for array in arrays:
            first = title[array.members[0]]
            count = len(array.members)
            name = f"{first.name} x {count}" if count > 1 else first.title
            lines.append(f"  {name:<28} {asks[first.fingerprint].words()}")
        return lines

    def _executor(
        self, folder: Path, wanted: Ask, name: str, dependency: str, throttle: int | None
    ) -> submitit.SlurmExecutor:
        threads = self._threads or wanted.cpus
        return make_executor(folder, wanted, name, dependency, throttle, threads, self._profile.python)

    def arrays(
        self, decisions: Sequence[Decision], elsewhere: Collection[str] = (), max_size: int = 1001
    ) -> tuple[list[Array], dict[str, Ask]]:
        """Return the arrays of the stages to submit, and what each stage asks for.

        Args:
            decisions: on the stages to submit, dependencies first.
            elsewhere: fingerprints that live jobs of others compute.
            max_size: Slurm's MaxArraySize.
        """
        asks = {decision.stage.fingerprint: self.ask(decision.stage) for decision in decisions}
        items = [
            Item(
                fingerprint,
                (stage.name, asks[fingerprint]),
                tuple(need for need in _needs(stage) if need in asks or need in elsewhere),
            )
            for stage in (decision.stage for decision in decisions)
            for fingerprint in (stage.fingerprint,)
        ]
        return make_arrays(items, max_size, self._parallel), asks

    def _record(
        self,
        identifier: str,
        decisions: Sequence[Decision],
        wanted: Sequence[Decision],
        jobs: Mapping[str, str],
        shared: Mapping[str, SubmittedStage],
        folder: Path,
        request: Request,
    ) -> Submission:
        asked = {decision.stage.fingerprint for decision in wanted}
        stages = []
        for decision in decisions:
            stage = decision.stage
            fingerprint = stage.fingerprint
            entry = SubmittedStage(fingerprint, stage.key, stage.title, needs=tuple(_needs(stage)))
            if fingerprint in jobs:
                paths = JobPaths(folder, jobs[fingerprint], 0)
                entry = replace(entry, job=jobs[fingerprint], stdout=str(paths.stdout), stderr=str(paths.stderr))
            elif fingerprint in shared:
                other = shared[fingerprint]
                entry = replace(entry, job=other.job, stdout=other.stdout, stderr=other.stderr, shared=True)
            if fingerprint in asked:
                entry = replace(entry, resources=_resources(self.ask(stage)), force=decision.force)
            stages.append(entry)
        return Submission(
            identifier,
            request.sweep,
            request.command,
            now(),
            code_revision(),
            str(request.out.absolute()),
            tuple(stages),
            request.arguments,
        )


def make_executor(
    folder: Path,
    wanted: Ask,
    name: str,
    dependency: str,
    throttle: int | None,
    threads: int,
    python: str | None = None,
) -> submitit.SlurmExecutor:
    """Return the executor that submits stages which ask for ``wanted``.

    Args:
        folder: for scripts and output.
        wanted: of the cluster.
        name: of the jobs.
        dependency: in sbatch's words; empty for none.
        throttle: how many elements run at a time; None for all.
        threads: of a task.
        python: command that starts Python; this process's by default.
    """
    executor = submitit.SlurmExecutor(folder, max_num_timeout=_RESTARTS, python=python)
    options = dict(wanted.options)
    additional: dict[str, Any] = {
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        **{key: value for key, value in options.items() if value is not False},
    }
    if wanted.gpus:
        kind = f"{wanted.gpu_type}:" if wanted.gpu_type else ""
        flag = ("gres", "gpu:") if wanted.gpu_flag == "gres" else ("gpus-per-node", "")
        additional[flag[0]] = f"{flag[1]}{kind}{wanted.gpus}"
    additional["mem"] = f"{wanted.memory_mb}M"
    parameters: dict[str, Any] = {
        "job_name": name,
        "time": wanted.minutes,
        "nodes": wanted.nodes,
        "ntasks_per_node": wanted.tasks // wanted.nodes,
        "cpus_per_task": wanted.cpus,
        "signal_delay_s": wanted.signal_seconds,
        "wckey": None,
        # srun does not take the cores of a task over from sbatch (since Slurm 22.05), nor what the script exports
        # where sbatch was told to export nothing. When one task dies, the others would wait for it for ever.
        "srun_args": ["--export=ALL", f"--cpus-per-task={wanted.cpus}", "--kill-on-bad-exit=1"],
        "setup": [*wanted.setup, *_exports(threads, wanted)],
        "additional_parameters": additional,
        "array_parallelism": throttle or sys.maxsize,
    }
    if dependency:
        parameters["dependency"] = dependency
    executor.update_parameters(**parameters)
    return executor


def script(executor: submitit.SlurmExecutor, count: int = 1) -> str:
    """Return the batch script that ``executor`` submits for ``count`` stages."""
    own = dict(executor.parameters)
    try:
        if count > 1:
            executor.parameters["map_count"] = count
        text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    finally:
        executor.parameters = own
    return text


def dependency_words(array: Array, ids: Sequence[Sequence[str]], outside: Mapping[str, str]) -> str:
    """Return what an array waits for in sbatch's words: ``afterok:7:8_3,aftercorr:9``; empty for nothing.

    Args:
        array: whose.
        ids: of the elements of the arrays before it.
        outside: fingerprint -> job, for stages that others compute.
    """
    words: dict[str, list[str]] = {}
    for wait in array.waits:
        kind = "aftercorr" if wait.each else "afterany" if wait.ended else "afterok"
        if wait.array < 0:
            job = outside[wait.outside]
        elif wait.element is not None:
            job = ids[wait.array][wait.element]
        else:
            job = queue.base_id(ids[wait.array][0])
        words.setdefault(kind, []).append(job)
    return ",".join(":".join([kind, *dict.fromkeys(jobs)]) for kind, jobs in words.items())


def summary_lines(record: Submission, count: int) -> list[str]:
    """Return what was submitted, for people: a line for each array or single job, and where the output goes.

    Args:
        record: of the submission.
        count: of stages that were submitted by the command that just ran.
    """
    groups: dict[str, list[SubmittedStage]] = {}
    for stage in record.stages:
        if stage.job:
            groups.setdefault(queue.base_id(stage.job), []).append(stage)
    own = sum(not members[0].shared for members in groups.values())
    shared = sum(stage.shared for stage in record.stages)
    if count:
        lines = [f"submitted {_many(count, 'stage')} in {_many(own, 'job')} as {record.id}"]
    else:
        lines = [f"nothing to submit: the queue has jobs for all of it ({record.id})"]
    if count and shared:
        lines[0] += f"; {_many(shared, 'stage')} of jobs that were there already"
    rows = [("job", "stage", "asks for", "log")]
    folders: dict[Path, None] = {}
    for job, members in groups.items():
        first, name = members[0], members[0].key.partition("/")[0]
        log = Path(first.stderr)
        folders[log.parent] = None
        array = "_" in first.job
        title = first.title if len(members) == 1 else f"{name} x {len(members)}"
        number = (
            f"{job}_[0-{len(members) - 1}]" if array and not first.shared else first.job if len(members) == 1 else job
        )
        words = "(there already)" if first.shared else str(first.resources.get("words", ""))
        rows.append((number, title, words, log.name.replace(f"{first.job}_", f"{job}_N_") if array else log.name))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines += [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    return [*lines, f"logs: {' '.join(map(_near, folders))}"]


def _wanted(decisions: Sequence[Decision], only: Collection[str] | None, store: Store) -> list[Decision]:
    """The stages that run, and of these, where ``only`` some are asked for, those and what they lack.

    Who forces a whole sweep anew has every stage run; who asks for one stage of it has no use for results to be made
    again that are there.
    """
    runs = [decision for decision in decisions if decision.action == "run"]
    if only is None:
        return runs
    asked = set(only)
    for decision in reversed(runs):
        if decision.stage.fingerprint in asked:
            asked.update(need.fingerprint for need in decision.stage.upstream.values() if not store.is_done(need))
    return [decision for decision in runs if decision.stage.fingerprint in asked]


def _shared(store: Store, wanted: Sequence[Decision]) -> dict[str, SubmittedStage]:
    """Those of the stages that a live job of an earlier submission computes, as recorded."""
    last: dict[str, tuple[SubmittedStage, str]] = {}
    for record in submissions.history(store):
        for stage in record.stages:
            if stage.job and not stage.shared:
                last.setdefault(stage.fingerprint, (stage, record.revision))
    asked = {decision.stage.fingerprint: decision for decision in wanted}
    known = {key: found for key, found in last.items() if key in asked}
    if not known:
        return {}
    states = queue.live_jobs({stage.job for stage, _ in known.values()})
    code = code_revision().partition("+")[2]
    shared = {}
    for key, (stage, revision) in known.items():
        state = states.get(stage.job)
        if state is None or state.reason == "DependencyNeverSatisfied":
            continue
        # One that has not started yet, and was submitted with other code, will refuse to.
        if not state.running and revision.partition("+")[2] != code:
            continue
        if asked[key].force and not stage.force:
            continue
        shared[key] = stage
    return shared


def _covering(store: Store, sweep: str, shared: Mapping[str, SubmittedStage]) -> Submission | None:
    """The newest submission of the sweep, if it names all these jobs."""
    newest = next((record for record in submissions.history(store) if record.sweep == sweep), None)
    if newest is None:
        return None
    jobs = {stage.fingerprint: stage.job for stage in newest.stages}
    return newest if all(jobs.get(key) == stage.job for key, stage in shared.items()) else None


def _needs(stage: Stage) -> list[str]:
    return list(dict.fromkeys(upstream.fingerprint for upstream in stage.upstream.values()))


def _resources(wanted: Ask) -> dict[str, Any]:
    return {
        "gpus": wanted.gpus * wanted.nodes,
        "cpus": wanted.cpus * wanted.tasks,
        "memory_gb": round(wanted.memory_mb * wanted.nodes / 1024, 3),
        "hours": round(wanted.minutes / 60, 3),
        "tasks": wanted.tasks,
        "nodes": wanted.nodes,
        "partition": wanted.partition,
        "device": wanted.device,
        "words": wanted.words(),
    }


def _exports(threads: int, wanted: Ask) -> list[str]:
    lines = [
        # What is imported here is imported there; a job does not start in this process's folder everywhere.
        f"export PYTHONPATH={shlex.quote(os.pathsep.join(_import_path()))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads}",
    ]
    for variable in (FOLDER_VARIABLE, EXTENSIONS_VARIABLE):
        if folder := os.environ.get(variable):
            lines.append(f"export {variable}={shlex.quote(os.path.abspath(folder))}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in wanted.environment]
    return lines


def _import_path() -> list[str]:
    """Folders that this process imports from, but for those of Python itself and its installed packages."""
    own = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)}
    found = dict.fromkeys(os.path.abspath(path) for path in [str(Path(__file__).parents[2]), *sys.path])
    outside = [path for path in found if not any(Path(path).resolve().is_relative_to(prefix) for prefix in own)]
    return [path for path in outside if os.path.exists(path)]


@contextlib.contextmanager
def _clean_environment(wanted: Ask) -> Iterator[None]:
    """Hide from sbatch what would change the script's meaning: another job's variables, and SBATCH_* that it answers.

    sbatch takes SBATCH_PARTITION and the like before what the script says, and a job submitted from within a job
    inherits parts of that one.
    """
    said = {key for key, _ in wanted.options}
    hidden = {}
    for name in list(os.environ):
        ours = name.startswith("SBATCH_") and not (
            (option := name.removeprefix("SBATCH_").lower()) in _KEPT and option not in said
        )
        job = name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")) and name != "SLURM_CONF"
        if ours or job:
            hidden[name] = os.environ.pop(name)
    try:
        yield
    finally:
        os.environ.update(hidden)


def _said(error: Exception) -> str:
    """Slurm's own words in the error of a submission."""
    lines = [line.strip() for line in str(error).splitlines() if "sbatch: error:" in line or "sbatch: fatal:" in line]
    words = [line.partition("sbatch: ")[2].partition(": ")[2] for line in lines]
    return "; ".join(dict.fromkeys(words)) or str(error).strip().splitlines()[-1]


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _hours(minutes: int) -> str:
    return f"{minutes / 60:.4g}"


def _near(folder: Path) -> str:
    """A path as people would type it here."""
    with contextlib.suppress(ValueError):
        return f"{folder.relative_to(Path.cwd())}/"
    return f"{folder}/"
