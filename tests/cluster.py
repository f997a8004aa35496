"""A real SLURM of two nodes on this host, with a folder, a munge key and ports of its own."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.launch import ROOT, environment, free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
GPUS = 8  # a node; they and the CPUs are names only
WAIT = 180
WAIT_FOR_JOB = 240  # it may be requeued
# cred_expire: seconds that a requeued job waits; under 5 means 120. KillWait: those that ranks have after SIGTERM.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
FirstJobId={first_job}
JobRequeue=0
KillWait=20
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=96 RealMemory=1000 Gres=gpu:a100:{gpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=1000 Gres=gpu:a100:{gpus}
PartitionName=p Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """What of SLURM is not installed here."""
    return [name for name in (*DAEMONS, "sbatch") if not executable(name)]


def executable(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """Starts on entering; on leaving, ends with all its jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = environment() | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._started = ExitStack()
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        folder = self.folder
        self._configure()
        with self._started:
            munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            own = [f"--{option}={folder}/munge.{end}" for option, end in munge.items()]
            self._daemon("munged", "--foreground", "--force", *own)
            self.until(lambda: (folder / "munge.socket").exists(), "munged")
            self._daemon("slurmctld", "-D", "-c")
            for node in ("n1", "n2"):
                self._daemon("slurmd", "-D", "-N", node)
            self.until(lambda: self.run("sinfo", "--noheader", "--states=idle", "--format=%D").strip() == "2", "nodes")
            self._started.callback(self._cancel_all)
            self._started = self._started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._started.close()

    def run(self, *command: str) -> str:
        """The output of one of SLURM's commands; raises AssertionError with its words if it fails."""
        done = subprocess.run(command, cwd=ROOT, env=self.environment, text=True, capture_output=True, timeout=WAIT)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *script: str, options: Sequence[str] = (), **variables: str) -> str:
        """The id of a job; `variables` are those of sbatch's --export. What it says, `log(id)` has."""
        export = ",".join(["--export=ALL", *(f"{name}={value}" for name, value in variables.items())])
        return self.run("sbatch", "--parsable", export, f"--output={self.folder}/%j.out", *options, *script).strip()

    def log(self, job: str) -> str:
        try:
            return (self.folder / f"{job}.out").read_text()
        except FileNotFoundError:  # not yet started
            return ""

    def field(self, job: str, name: str) -> str:
        """Of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S+)", self.run("scontrol", "show", "job", job))
        assert found
        return found[1]

    def finished(self, job: str) -> tuple[str, int]:
        """Waits for a job's end. -> its state, and how often it was started again."""
        self.until(lambda: self.field(job, "JobState") in ENDED, f"job {job}", WAIT_FOR_JOB)
        return self.field(job, "JobState"), int(self.field(job, "Restarts"))

    def until(self, ready: Callable[[], bool], what: str, seconds: float = WAIT) -> None:
        """Raises AssertionError with the daemons' last words if one has ended, or `seconds` have passed."""
        deadline = time.monotonic() + seconds
        while True:
            dead = [(daemon.args, daemon.returncode) for daemon in self._daemons if daemon.poll() is not None]
            assert not dead, f"waiting for {what}: {dead} ended{self._last_words()}"
            if ready():
                return
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}{self._last_words()}"
            time.sleep(0.1)

    def _last_words(self) -> str:
        logs = [self.folder / f"{name}.log" for name in DAEMONS]
        return "".join(f"\n{log}:\n{log.read_text()[-2000:]}" for log in logs if log.exists())

    def _configure(self) -> None:
        folder = self.folder
        for name in ("state", "spool.n1", "spool.n2"):
            (folder / name).mkdir()
        conf = CONF.format(
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            folder=folder,
            ports=[free_port() for _ in range(3)],
            gpus=GPUS,
            first_job=os.getpid(),  # ranks meet on ports that follow from it
        )
        (folder / "slurm.conf").write_text(conf)
        for gpu in range(GPUS):
            (folder / f"gpu{gpu}").symlink_to("/dev/null")  # slurmd names to tasks what are devices only
        (folder / "gres.conf").write_text(f"Name=gpu Type=a100 File={folder}/gpu[0-{GPUS - 1}]\n")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))

    def _cancel_all(self) -> None:
        self.run("scancel", f"--user={getpass.getuser()}")
        self.until(lambda: not self.run("squeue", "--noheader"), "the end of all jobs")

    def _daemon(self, name: str, *args: str) -> None:
        path = executable(name)
        assert path
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [path, *args], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self._daemons.append(process)
        self._started.callback(_stop, process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
