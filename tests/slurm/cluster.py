"""A real Slurm on one machine, for tests: two nodes on loopback, each with four GPUs that are none.

``with Cluster() as cluster:`` starts munge, MariaDB, slurmdbd, slurmctld and two slurmd in a temporary folder, as
children of this process, and stops them again: these, by their process ids, and what ran in their jobs, by the mark that
it carries in its environment. Nothing else on the machine is touched. It needs root and Debian's packages::

    python tests/slurm/cluster.py install    install what is missing of them; none of their services is started
    python tests/slurm/cluster.py            run a cluster until Ctrl-C, to try things by hand
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PACKAGES = (
    "munge",
    "slurm-client",
    "slurmctld",
    "slurmd",
    "slurmdbd",
    "mariadb-server-core",
    "mariadb-client-core",
)
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacctmgr")
NODES = ("n1", "n2")
GPUS, CPUS, MEMORY_MB = 4, 32, 64000  # of each node; claimed, not there
REQUEUE_S = 8
"""Seconds after which a requeued job starts again; Slurm's default is 121."""

_MARK = "LOOPBACK_CLUSTER"  # not SLURM_...: those are not handed on to jobs that a job submits
_SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
# Idle and working nodes; a star or another suffix says that the node does not answer.
_GOOD_STATES = {"idle", "mixed", "allocated", "completing"}


def missing_packages() -> list[str]:
    """Return which of Debian's packages are not installed."""
    missing = []
    for package in PACKAGES:
        query = ["dpkg-query", "-W", "-f", "${db:Status-Status}", package]
        found = subprocess.run(query, capture_output=True, text=True)
        if found.stdout.strip() != "installed":
            missing.append(package)
    return missing


def why_not() -> str:
    """Return why no cluster can be started here, or an empty string."""
    if os.geteuid() != 0:
        return "starting a Slurm needs root"
    if absent := [program for program in PROGRAMS if not shutil.which(program, path=_SYSTEM_PATH)]:
        return f"Slurm is not installed ({absent[0]} is missing): make test-slurm installs it"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return f"this machine's own name, {socket.gethostname()}, has no address: put it in /etc/hosts"
    return ""


class ClusterError(Exception):
    """The cluster did not do what it was told; the message holds the ends of its logs."""


class Cluster:
    """The cluster, from ``with`` or :meth:`start` on.

    Partitions: ``main`` (the default), ``low`` (preempted by ``high``, which requeues its jobs), ``high``, ``short``
    (one minute at most) and ``down``.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets' names are limited
        self.conf = self.folder / "slurm.conf"
        self._port = _free_ports(2 + len(NODES))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._signed = f"{self.folder}:{os.getpid()}"

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- for clients

    def environment(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Return ``base`` so that Slurm's commands (and submitit) find this cluster, and its jobs carry its mark."""
        kept = {k: v for k, v in base.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_"))}
        if kept.pop("PYTHONDONTWRITEBYTECODE", ""):
            # Dozens of jobs import torch: with its bytecode kept somewhere each starts in a third of the time.
            kept["PYTHONPYCACHEPREFIX"] = str(self.folder / "bytecode")
        return {**kept, "PATH": _SYSTEM_PATH, "SLURM_CONF": str(self.conf), _MARK: self._signed}

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands and return what it printed."""
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """Return job id (``12`` or ``12_3``) -> state, of the jobs that are not over."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i %T").split("\n")
        return dict(line.split() for line in lines if line)

    def wait_idle(self, seconds: float = 120) -> None:
        """Wait until no job is left, dependants of failed ones included."""
        self._wait(lambda: not self.jobs(), seconds, "the end of all jobs")

    def job_processes(self, job: str | None = None, node: str | None = None) -> dict[int, str]:
        """Return process id -> command line of what runs in the jobs: Slurm's step daemons are not among them.

        Args:
            job: only of this job (``12`` or ``12_3``).
            node: only on this node.
        """
        found = {}
        for pid, environment in _environments():
            own = environment.get("SLURM_ARRAY_JOB_ID", environment.get("SLURM_JOB_ID"))
            if environment.get(_MARK) != self._signed or own is None:
                continue
            if "SLURM_ARRAY_TASK_ID" in environment:
                own += f"_{environment['SLURM_ARRAY_TASK_ID']}"
            if (job is None or own == job) and (node is None or environment.get("SLURMD_NODENAME") == node):
                found[pid] = _command_line(pid)
        return found

    def workers(self, job: str | None = None) -> list[int]:
        """Return the process ids of the tasks: the Pythons that srun started."""
        processes = self.job_processes(job)
        return sorted(pid for pid, line in processes.items() if "submitit.core._submit" in line and "srun" not in line)

    # -- faults

    def kill_node(self, node: str) -> None:
        """Let a node die: its slurmd, its step daemons and what runs in its jobs are killed, and Slurm is told.

        Slurm would find out by itself after minutes; that one tells it shortens the wait and nothing else.
        """
        daemon = self._processes.pop(f"slurmd.{node}")
        steps = self._step_daemons(node)
        daemon.kill()
        daemon.wait()
        _kill(*steps, *self.job_processes(node=node))
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=killed by a test")

    def start_node(self, node: str) -> None:
        """Bring a dead node back."""
        self._daemon(f"slurmd.{node}")
        self._wait(self._resumed, 60, f"node {node}")

    def heal(self) -> None:
        """Make the cluster as new for the next test: no job, no daemon dead, every node up."""
        for name in self._names():
            if name not in self._processes or self._processes[name].poll() is not None:
                self._daemon(name)
        if jobs := sorted({job.split("_")[0] for job in self.jobs()}):
            self.run("scancel", "--full", "--signal=KILL", *jobs, check=False)
            self.run("scancel", *jobs, check=False)
        self.wait_idle(60)
        _kill(*self.job_processes())
        self._wait(self._resumed, 60, "the nodes")

    # -- starting and stopping

    def start(self) -> None:
        """Write the configuration and start everything."""
        _clear_leftovers()
        self._configure()
        for name in self._names():
            self._daemon(name)
        self._wait(self._resumed, 60, "the nodes")

    def stop(self) -> None:
        """Stop everything that was started, jobs first: they would outlive their daemons."""
        if "slurmctld" in self._processes:
            with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
                if jobs := sorted({job.split("_")[0] for job in self.jobs()}):
                    self.run("scancel", "--full", "--signal=KILL", *jobs, check=False)
                    self.run("scancel", *jobs, check=False)
                    self.wait_idle(30)
        steps = [pid for node in NODES for pid in self._step_daemons(node)]
        for name in reversed(self._names()):
            if daemon := self._processes.pop(name, None):
                daemon.terminate()
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        _kill(*steps, *self.job_processes())
        shutil.rmtree(self.folder, ignore_errors=True)

    def _names(self) -> list[str]:
        return ["munged", "mariadbd", "slurmdbd", "slurmctld", *(f"slurmd.{node}" for node in NODES)]

    def _daemon(self, name: str) -> None:
        """Start a daemon, in the foreground as a child of this process, and wait until it answers."""
        at = self.folder
        socket_of_munge = f"--socket={at}/munge.sock"
        if name == "mariadbd" and not (at / "mysql").exists():
            install = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={at}/mysql"]
            self._call([*install, "--auth-root-authentication-method=normal", "--skip-test-db"])
        if name == "slurmctld":
            self._wait(self._registered, 30, "the cluster's entry in slurmdbd")
        commands = {
            "munged": ["munged", "--foreground", socket_of_munge, f"--key-file={at}/munge.key"]
            + [f"--pid-file={at}/munged.pid", f"--seed-file={at}/munged.seed", "--num-threads=4", "--force"],
            # Without a port: slurmdbd comes by the socket.
            "mariadbd": ["mariadbd", "--no-defaults", "--user=root", f"--datadir={at}/mysql", "--skip-networking"]
            + [f"--socket={at}/mysql.sock", f"--pid-file={at}/mariadbd.pid", "--skip-log-bin"]
            + ["--performance-schema=off", "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=64M"]
            + ["--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0"],
            "slurmdbd": ["slurmdbd", "-D"],
            "slurmctld": ["slurmctld", "-D", "-f", str(self.conf)],
            **{f"slurmd.{n}": ["slurmd", "-D", "-f", str(self.conf), "-N", n] for n in NODES},
        }
        # Where this process is killed, the daemons end too.
        command = ["setpriv", "--pdeathsig", "TERM", *commands[name]]
        with (at / "log" / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env={**self.environment(), "MYSQL_UNIX_PORT": f"{at}/mysql.sock"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait(lambda: self._answers(name), 60, f"an answer of {name}")

    def _answers(self, name: str) -> bool:
        if self._processes[name].poll() is not None:
            raise ClusterError(f"{name} ended with code {self._processes[name].returncode}\n{self._logs(name)}")
        match name:
            case "munged":
                return self._works("munge", "-n", "-S", f"{self.folder}/munge.sock")
            case "mariadbd":
                return self._works(
                    "mariadb", "--no-defaults", "-u", "root", "-S", f"{self.folder}/mysql.sock", "-e", ""
                )
            case "slurmdbd":
                return _listening(self._port + 1)
            case "slurmctld":
                return "is UP" in self.run("scontrol", "ping", check=False)
            case _:
                return _listening(self._port + 2 + NODES.index(name.partition(".")[2]))

    def _registered(self) -> bool:
        if self.run("sacctmgr", "-n", "-P", "show", "cluster", "loopback", "format=cluster", check=False).strip():
            return True
        self.run("sacctmgr", "-i", "add", "cluster", "loopback", check=False)
        return False

    def _resumed(self) -> bool:
        """Whether every node takes jobs; those that a fault left down or drained are told to."""
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %T", "-p", "main", check=False).splitlines()
        states = dict(line.split() for line in lines)
        for node, state in states.items():
            if state.startswith(("down", "drain", "fail")):
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return len(states) == len(NODES) and set(states.values()) <= _GOOD_STATES

    def _works(self, *command: str) -> bool:
        return subprocess.run(command, env=self.environment(), capture_output=True, timeout=60).returncode == 0

    def _call(self, command: list[str]) -> None:
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise ClusterError(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise ClusterError(f"{what}: not there after {seconds:g} s\n{self._logs()}")
            time.sleep(0.05)

    def _logs(self, name: str | None = None) -> str:
        parts = []
        for path in sorted((self.folder / "log").glob(f"{name or '*'}.log")):
            lines = path.read_text(errors="replace").splitlines()[-8:]
            parts.append("\n".join([f"{path.name}:", *lines]))
        if self.conf.exists() and name is None:
            with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
                parts.append(self.run("squeue", check=False) + self.run("sinfo", "-N", check=False))
        return "\n".join(parts)

    def _step_daemons(self, node: str) -> list[int]:
        """The slurmstepd of a node: they write over their environment, but have their slurmd's log open."""
        own = []
        log = str(self.folder / "log" / f"slurmd.{node}.log")
        for pid in _pids():
            with contextlib.suppress(OSError):
                if os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("slurmstepd"):
                    files = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
                    if log in files:
                        own.append(pid)
        return own

    def _configure(self) -> None:
        at, host, port = self.folder, socket.gethostname().partition(".")[0], self._port
        for name in ("log", "state", "dev", *(f"spool.{node}" for node in NODES)):
            (at / name).mkdir()
        at.chmod(0o755)
        _write_secret(at / "munge.key", os.urandom(1024))
        for index in range(GPUS):
            # slurmd takes character devices only: these are /dev/null by another name.
            os.mknod(at / "dev" / f"gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (at / "gres.conf").write_text(f"NodeName=n[1-{len(NODES)}] Name=gpu File={at}/dev/gpu[0-{GPUS - 1}]\n")
        _write_secret(
            at / "slurmdbd.conf",
            f"""\
AuthType=auth/munge
AuthInfo=socket={at}/munge.sock
CommunicationParameters=NoInAddrAny
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port + 1}
SlurmUser=root
PidFile={at}/slurmdbd.pid
LogFile={at}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
""".encode(),
        )
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 2 + index} CPUs={CPUS} "
            f"RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN"
            for index, node in enumerate(NODES)
        )
        # KillWait shorter than cred_expire by 4 s or more: a job that starts again while its killed processes still
        # end is a duplicate to slurmd, which drains the node.
        self.conf.write_text(
            f"""\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={at}/munge.sock,cred_expire={REQUEUE_S - 1}
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool.%n
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd.%n.pid
SlurmctldLogFile={at}/log/slurmctld.log
SlurmdLogFile={at}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=2
MessageTimeout=30
MaxArraySize=1001
MaxJobCount=20000
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2,bf_continue,default_queue_depth=1000
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port + 1}
AccountingStoragePass={at}/munge.sock
AccountingStorageTRES=gres/gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=1-0 DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=low Nodes=ALL MaxTime=1-0 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=5 State=UP
PartitionName=high Nodes=ALL MaxTime=1-0 DefaultTime=10 PriorityTier=100 PreemptMode=OFF State=UP
PartitionName=short Nodes=ALL MaxTime=1 DefaultTime=1 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=down Nodes=ALL MaxTime=1-0 DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=DOWN
"""
        )


def _write_secret(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
        handle.write(content)


def _pids() -> Iterator[int]:
    yield from (int(name) for name in os.listdir("/proc") if name.isdigit())


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    """Every process with its environment, but for this one and those that it descends from."""
    own, pid = {os.getpid()}, os.getpid()
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        own.add(pid)
    for pid in _pids():
        if pid not in own:
            with contextlib.suppress(OSError):
                entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                yield pid, dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _clear_leftovers() -> None:
    """End the jobs of clusters whose own process was killed, and remove their folders: by the mark that they carry."""
    for pid, environment in list(_environments()):
        folder, _, owner = environment.get(_MARK, "").rpartition(":")
        if folder and not _lives(int(owner)):
            _kill(pid)
            shutil.rmtree(folder, ignore_errors=True)


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    return ""


def _kill(*pids: int) -> None:
    """Kill processes and wait until they are gone, with the locks and files that they held."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while any(_lives(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        # The first thread of a dead process may be gone while others still hold its files.
        return state not in "ZX" or len(os.listdir(f"/proc/{pid}/task")) > 1
    return False


def _listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _free_ports(count: int) -> int:
    """The first of ``count`` neighbouring ports that nobody listens on; below those that outgoing connections take."""
    first = 17000 + os.getpid() % 500 * 20
    for start in (*range(first, 30000, 20), *range(17000, first, 20)):
        if not any(_listening(port) for port in range(start, start + count)):
            return start
    raise ClusterError(f"no {count} free ports from 17000 to 30000")


def install() -> int:
    """Install what is missing, after saying what that is; return 2 where it cannot be done."""
    if all(shutil.which(program, path=_SYSTEM_PATH) for program in PROGRAMS):
        return 0
    missing = missing_packages() if shutil.which("dpkg-query") else list(PACKAGES)
    for needed, absent in (("apt-get (Debian)", not shutil.which("apt-get")), ("root", os.geteuid() != 0)):
        if absent:
            print(f"error: the Slurm tests need {needed} to install {' '.join(missing)}", file=sys.stderr)
            return 2
    print(f"installing Debian packages for the Slurm tests: {' '.join(missing)}", flush=True)
    # The services of the packages must not start: they would take the default ports and folders.
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing]
    try:
        for before in ([], ["apt-get", "-qq", "update"]):  # the lists may be missing, or old
            if before:
                subprocess.run(before, env=environment, stdin=subprocess.DEVNULL)
            if subprocess.run(command, env=environment, stdin=subprocess.DEVNULL).returncode == 0:
                return 0
    finally:
        if made:
            policy.unlink()
    print(f"error: apt-get could not install {' '.join(missing)}", file=sys.stderr)
    return 2


def main() -> int:
    """Install, or run a cluster until Ctrl-C."""
    if sys.argv[1:] == ["install"]:
        return install()
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Cluster() as cluster:
        print(f"export SLURM_CONF={cluster.conf}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
