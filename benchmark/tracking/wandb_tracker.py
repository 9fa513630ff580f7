"""Weights & Biases: offline unless the user is logged in, silent, quick to open, and never the reason a stage dies."""

from __future__ import annotations

import configparser
import contextlib
import http.client
import io
import logging
import netrc
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmark.tracking.base import Artifact, Status, Table
from benchmark.tracking.directions import direction

logger = logging.getLogger(__name__)

PROJECT = "brain-it-bench"
"""W&B project where ``WANDB_PROJECT`` names no other."""

UNSENT = ".unsent"
"""Ends the name of a mark beside the file of an online run that could not be uploaded to its end."""

_REACH_S = 15.0
_ASK_AGAIN_S = 600.0  # a server that gave no answer is not asked again by every stage
_UPLOAD_S = 3600.0  # for an artifact's files, as long as the server is there
_FINISH_S = 60.0  # for the rest at the end of a run; W&B itself would wait for ever for a server that has gone
_SYSTEM_S = 10.0  # between two records of CPU, memory, disk, network and GPUs
_TAG = 64  # characters, W&B's limit
_SYNC = "python -m benchmark.sweep sync uploads it"
_silent: dict[str, float] = {}  # address of a server that gave no answer -> when


class WandbTracker:
    """One W&B run: the group is the sweep, the job type the stage, the id comes from the stage's fingerprint.

    Everything that W&B writes goes under ``folder``, also media and caches, which it would otherwise keep in the user's
    home. Several runs, one after the other, share one service process; all but the first open in about 20 ms.

    An offline run that is resumed restarts W&B's own step at 0, so every record carries ``global_step``, which is the x
    axis of every chart. A run that cannot be opened online is kept offline.

    Args:
        folder: of the stage's tracking.
        group, job_type, run_id, name, config, tags: of the run.
        mode: W&B's mode; by default see :func:`preferred_mode`.
        replace: start the run anew, in the place of one of its id that the server has, instead of resuming it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        group: str,
        job_type: str,
        run_id: str,
        name: str,
        config: Mapping[str, Any],
        tags: Sequence[str] = (),
        mode: str | None = None,
        replace: bool = False,
    ) -> None:
        self._run: Any = None
        self._warned = False
        self._gone = ""  # why the server of an online run no longer answers
        self._step = 0
        self._defined: set[str] = set()
        self._outer_environment: dict[str, str | None] = {}

        def start(chosen: str) -> Any:
            self._outer_environment = _redirect(folder, chosen)
            import wandb

            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                dir=str(folder),
                group=group or None,
                job_type=job_type,
                id=run_id,
                name=name,
                config=dict(config),
                tags=list(dict.fromkeys(tag[:_TAG] for tag in tags)) or None,
                mode=chosen,  # type: ignore[arg-type]  # the user's word: W&B checks it
                resume=None if replace else "allow",
                reinit="create_new",
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    symlink=False,
                    # The manifest of the stage records code and packages; W&B need not look for them again.
                    disable_git=True,
                    disable_code=True,
                    save_code=False,
                    disable_job_creation=True,
                    x_save_requirements=False,
                    x_stats_sampling_interval=_SYSTEM_S,
                    # This machine, now, is not what an earlier run ran on.
                    x_disable_stats=replace,
                    x_disable_machine_info=replace,
                    init_timeout=60.0,
                    **_where_known(
                        wandb.Settings,
                        # W&B keeps up to 15 s of a run in memory, which a killed job would lose.
                        x_transaction_log_flush_interval=1.0,
                        finish_timeout=_FINISH_S,
                        finish_timeout_raises=True,
                    ),
                ),
            )
            try:
                run.define_metric("global_step", hidden=True)
                run.define_metric("*", step_metric="global_step")
            except BaseException:
                run.finish(exit_code=1)  # or W&B would wait for it at the end of the process
                raise
            return run

        chosen = mode or preferred_mode()
        chosen = {"run": "online", "dryrun": "offline"}.get(chosen, chosen)  # W&B's older words
        if chosen == "online" and not logged_in():
            chosen = "offline"  # W&B would ask for a key at the terminal, and end the run where there is none
        if chosen == "online":
            try:
                if not _lately_silent():
                    with _hushed():
                        self._run = start("online")
            except Exception as error:
                self._restore_environment()
                logger.warning("W&B: %s; this run is kept offline: %s", _in_line(error), _SYNC)
                _forget()
            chosen = "offline"
        if self._run is None:
            trouble = "could not start, this stage is logged to metrics.jsonl only"
            self._run = self._guard(trouble, lambda: start(chosen))
        if self._run is None:
            self._restore_environment()

    def log(self, metrics: Mapping[str, float], step: int, when: float | None = None) -> None:
        """Log the metrics with ``global_step`` beside them."""
        self._step = step
        told = {} if when is None else {"_timestamp": when}

        def send(run: Any) -> None:
            self._define(run, metrics)
            run.log({**metrics, "global_step": step, **told})

        self._call("log", send)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Add the values to the run's summary."""

        def send(run: Any) -> None:
            self._define(run, values)
            run.summary.update(dict(values))

        self._call("summary", send)

    def image(self, name: str, path: Path) -> None:
        """Log a copy of the image."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path)), "global_step": self._step})

        self._call("image", send)

    def table(self, table: Table) -> None:
        """Log the table with copies of its images."""

        def send(run: Any) -> None:
            import wandb

            def cell(value: Any) -> Any:
                return wandb.Image(str(value)) if isinstance(value, Path) else value

            self._check_server(run)
            made = wandb.Table(columns=list(table.columns), data=[[cell(value) for value in row] for row in table.rows])
            run.log({table.name: made, "global_step": self._step})

        self._call("table", send)

    def artifact(self, artifact: Artifact) -> None:
        """Log the artifact; online, say which of those that W&B has were used.

        Offline W&B takes no word of what was used; the metadata says it, too.
        """

        def send(run: Any) -> None:
            import wandb

            self._check_server(run)
            metadata = {**artifact.metadata, "uses": list(artifact.uses)}
            made = wandb.Artifact(artifact.name, artifact.type, metadata=metadata)
            for name, path in artifact.files.items():
                # A stage's results do not change: W&B need not make a copy to upload from.
                made.add_file(str(path.resolve()), name=name, policy="immutable")
            for name, path in artifact.references.items():
                made.add_reference(path.resolve().as_uri(), name=name)
            if run.offline:
                run.log_artifact(made)
            else:
                self._use(run, artifact.uses)
                _wait_for(run.log_artifact(made))

        self._call("artifact", send)

    def finish(self, status: Status = "done") -> None:
        """Close the run with exit code 0 if ``done``, else 1: W&B shows it as failed, or as preempted.

        Where the server went away meanwhile the run's file is marked, to be uploaded later.
        """
        if status == "interrupted":
            self._call("finish", lambda run: run.mark_preempting())

        def send(run: Any) -> None:
            try:
                with _hushed():
                    run.finish(exit_code=0 if status == "done" else 1)
            except TimeoutError:
                for file in Path(run.dir).parent.glob("run-*.wandb"):
                    file.with_name(file.name + UNSENT).touch()
                raise TimeoutError(f"{server()} took no more of this run; {_SYNC}") from None

        self._call("finish", send)
        self._run = None
        self._restore_environment()

    def _check_server(self, run: Any) -> None:
        """Refuse what W&B has to ask its server for, where there is none any more: each try takes half a minute.

        Raises:
            ConnectionError: there is none.
        """
        if not run.offline:
            self._gone = self._gone or unreachable()
            if self._gone:
                raise ConnectionError(f"{self._gone}; python -m benchmark.tracking rebuild makes the run complete")

    def _define(self, run: Any, names: Iterable[str]) -> None:
        """Tell W&B which way is better, before it sees a metric for the first time."""
        for name in names:
            if name not in self._defined:
                self._defined.add(name)
                if better := direction(name):
                    run.define_metric(name, step_metric="global_step", summary=f"{better},last")

    def _use(self, run: Any, names: Iterable[str]) -> None:
        for name in names:
            try:
                run.use_artifact(f"{name}:latest")
            except Exception as error:  # made by a stage that was not tracked, or whose run was not uploaded yet
                logger.debug("W&B has no artifact %s: %s", name, error)

    def _call(self, what: str, action: Callable[[Any], None]) -> None:
        if self._run is not None:
            self._guard(f"failed at '{what}', later failures are not shown", lambda: action(self._run))

    def _guard(self, trouble: str, action: Callable[[], Any]) -> Any:
        """Run ``action``; whatever W&B raises becomes one line of warning a run."""
        try:
            return action()
        except Exception as error:
            if not self._warned:
                self._warned = True
                logger.warning("W&B %s: %s", trouble, _in_line(error))
            return None

    def _restore_environment(self) -> None:
        for name, value in self._outer_environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._outer_environment = {}


def notice(sweep: str) -> str:
    """Return one line for a user without a key of W&B, who did not choose to go without: where the runs are."""
    settings = _user_settings()
    chosen = os.environ.get("WANDB_MODE") or settings.get("mode") or "online"
    if logged_in() or chosen != "online":
        return ""
    return (
        "W&B: no key found, so runs are kept offline in the store; to upload them, type wandb login, then "
        f"python -m benchmark.sweep sync {sweep}"
    )


def _where_known(settings: Any, **values: Any) -> dict[str, Any]:
    """Return those settings that this release of W&B has."""
    known = getattr(settings, "model_fields", {})
    return {name: value for name, value in values.items() if name in known}


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep W&B from printing lines of its own, which it does at login and at a timeout even where it is silent."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _forget() -> None:
    """End W&B's own process, which holds on to the id of a run that could not be opened."""
    with contextlib.suppress(Exception), _hushed():
        import wandb

        wandb.teardown()


def _wait_for(artifact: Any) -> None:
    """Wait until the artifact is uploaded, or its server has gone."""
    end = time.monotonic() + _UPLOAD_S
    while time.monotonic() < end:
        try:
            artifact.wait(timeout=int(_REACH_S) or 1)
            return
        except Exception as error:
            if not isinstance(error.__cause__, TimeoutError):
                raise
            if unreachable():
                return


def _in_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _lately_silent() -> bool:
    """Return whether the user's server gives no answer, and say so once in a while.

    W&B would try for a minute, and then keep nothing; compute nodes often have no internet.
    """
    address = server()
    if time.monotonic() - _silent.get(address, -_ASK_AGAIN_S) < _ASK_AGAIN_S:
        return True
    why = unreachable()
    if why:
        _silent[address] = time.monotonic()
        logger.warning("W&B: %s; this run is kept offline: %s", why, _SYNC)
    return bool(why)


def preferred_mode() -> str:
    """Return ``WANDB_MODE``, else what ``wandb online|offline`` chose, else ``online`` if logged in, else ``offline``.

    Looks at the environment and at files only, never at the network.
    """
    settings = _user_settings()
    return os.environ.get("WANDB_MODE") or settings.get("mode") or ("online" if logged_in() else "offline")


def server() -> str:
    """Return the address of the user's W&B server."""
    return os.environ.get("WANDB_BASE_URL") or _user_settings().get("base_url") or "https://api.wandb.ai"


def unreachable() -> str:
    """Ask the user's W&B server for anything at all; return why there is no answer, or nothing where there is one."""
    address = server()
    try:
        # Any HTTP answer will do; the proxies of the environment are used, as W&B does.
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_REACH_S).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{address} cannot be reached ({getattr(error, 'reason', error)})"
    return ""


def logged_in() -> bool:
    """Return whether a key for the user's W&B server lies in the environment, in W&B's settings or in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if _user_settings().get("api_key"):
        return True
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        try:
            entry = netrc.netrc(str(Path(candidate).expanduser())).authenticators(urlsplit(server()).netloc)
        except (OSError, RuntimeError, netrc.NetrcParseError):
            continue
        if entry and entry[2]:
            return True
    return False


def _user_settings() -> dict[str, str]:
    """Return what ``wandb login`` and ``wandb offline`` wrote down; empty where there is nothing to read."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings")
    except (OSError, RuntimeError, configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}


def _redirect(folder: Path, mode: str) -> dict[str, str | None]:
    """Point W&B's folders into ``folder``; return the values that the variables had before."""
    own = folder / "wandb"
    places = {"WANDB_DIR": folder, "WANDB_DATA_DIR": own / "data", "WANDB_CACHE_DIR": own / "cache"}
    if mode != "online":
        # Online, the user's own config is needed: it names their server and entity.
        places["WANDB_CONFIG_DIR"] = own / "config"
    before = {name: os.environ.get(name) for name in (*places, "WANDB_ERROR_REPORTING")}
    if mode != "online":
        # W&B's own telemetry would go to its server even when runs are offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    for name, place in places.items():
        place.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(place.resolve())
    return before
