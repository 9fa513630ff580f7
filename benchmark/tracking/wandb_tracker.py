"""Weights & Biases: offline unless the user is logged in, silent, quick to open, and never the reason a stage dies."""

from __future__ import annotations

import configparser
import http.client
import logging
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmark.tracking.base import Status

logger = logging.getLogger(__name__)

PROJECT = "brain-it-bench"
"""W&B project where ``WANDB_PROJECT`` names no other."""

_REACH_S = 15.0


class WandbTracker:
    """One W&B run: the group is the sweep, the job type the stage, the id comes from the stage's fingerprint.

    Everything that W&B writes goes under ``folder``, also media and caches, which it would otherwise keep in the user's
    home. Several runs, one after the other, share one service process; all but the first open in about 20 ms.

    An offline run that is resumed restarts W&B's own step at 0, so every record carries ``global_step``, which is the x
    axis of every chart.
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
        mode: str | None = None,
    ) -> None:
        self._run: Any = None
        self._warned = False
        self._step = 0
        self._outer_environment: dict[str, str | None] = {}

        def start(chosen: str) -> Any:
            self._outer_environment = _redirect(folder, chosen)
            import wandb

            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                dir=str(folder),
                group=group,
                job_type=job_type,
                id=run_id,
                name=name,
                config=dict(config),
                mode=chosen,  # type: ignore[arg-type]  # the user's word: W&B checks it
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    symlink=False,
                    # The manifest of the stage records code, packages and hardware; W&B need not look for them again.
                    disable_git=True,
                    disable_code=True,
                    save_code=False,
                    disable_job_creation=True,
                    x_save_requirements=False,
                    x_disable_machine_info=True,
                    x_disable_stats=chosen != "online",
                    init_timeout=60.0,
                    **_often_on_disk(wandb.Settings),
                ),
            )
            run.define_metric("global_step", hidden=True)
            run.define_metric("*", step_metric="global_step")
            return run

        chosen = mode or preferred_mode()
        chosen = {"run": "online", "dryrun": "offline"}.get(chosen, chosen)  # W&B's older words
        if chosen == "online" and (why := unreachable()):
            # W&B would try for a minute, and then keep nothing; compute nodes often have no internet.
            logger.warning("W&B: %s; this run is kept offline: python -m benchmark.sweep sync uploads it", why)
            chosen = "offline"
        self._run = self._guard("could not start, this stage is logged to metrics.jsonl only", lambda: start(chosen))
        if self._run is None:
            self._restore_environment()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics with ``global_step`` beside them."""
        self._step = step
        self._call("log", lambda run: run.log({**metrics, "global_step": step}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Add the values to the run's summary."""
        self._call("summary", lambda run: run.summary.update(dict(values)))

    def image(self, name: str, path: Path) -> None:
        """Log a copy of the image."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path)), "global_step": self._step})

        self._call("image", send)

    def finish(self, status: Status = "done") -> None:
        """Close the run with exit code 0 if ``done``, else 1: W&B shows it as failed, or as preempted."""
        if status == "interrupted":
            self._call("finish", lambda run: run.mark_preempting())
        self._call("finish", lambda run: run.finish(exit_code=0 if status == "done" else 1))
        self._run = None
        self._restore_environment()

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
                message = " ".join(str(error).split()) or type(error).__name__
                logger.warning("W&B %s: %s", trouble, message[:300])
            return None

    def _restore_environment(self) -> None:
        for name, value in self._outer_environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._outer_environment = {}


def _often_on_disk(settings: Any) -> dict[str, Any]:
    """W&B keeps up to 15 s of a run in memory, which a killed job would lose; older releases wrote at once."""
    name = "x_transaction_log_flush_interval"
    return {name: 1.0} if name in getattr(settings, "model_fields", {}) else {}


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
