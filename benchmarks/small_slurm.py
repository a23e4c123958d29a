"""A Slurm of this machine alone, in a temporary folder: munged, slurmctld and slurmd as one node. For tests of it."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
SECONDS = 60  # that the daemons may take to start
CONFIGURATION = """
ClusterName=small
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str:
    """Why there can be no Slurm here; "" where there can."""
    lacking = [name for name in PROGRAMS if _path(name) is None]
    if lacking:
        return f"no {', '.join(lacking)} here: apt-get install slurm-wlm munge"
    return "" if os.getuid() == 0 else "slurmd is to be started by root"


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A Slurm with one node of two cores, two partitions ("main", and "urgent" that preempts it) and no GPU.

    The environment of this process names it (SLURM_CONF) until the block ends, and with it all daemons and jobs.
    """
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "key").write_bytes(secrets.token_bytes(128))
    (folder / "key").chmod(0o600)
    host, ports = platform.node().split(".")[0], _free_ports(2)
    file = folder / "slurm.conf"
    values = {"folder": folder, "host": host, "user": "root", "controller": ports[0], "node": ports[1]}
    file.write_text(CONFIGURATION.format(**values))
    munge = [
        f"--{n}={folder / f}" for n, f in (("socket", "munge.sock"), ("key-file", "key"), ("pid-file", "munge.pid"))
    ]
    munge += [f"--log-file={folder / 'munged.log'}", f"--seed-file={folder / 'seed'}", "--foreground", "--force"]
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(file)
    with ExitStack() as stack:
        stack.callback(_put_back, before)
        _started(stack, ["munged", *munge], folder)
        _wait(lambda: (folder / "munge.sock").exists(), folder)
        _started(stack, ["slurmctld", "-D", "-f", str(file)], folder)
        _started(stack, ["slurmd", "-D", "-f", str(file), "-N", host], folder)
        stack.callback(_end_jobs)
        _wait(lambda: "idle" in _told(["sinfo", "--noheader", "--format=%T"]), folder)
        yield dict(os.environ)


def _path(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _started(stack: ExitStack, command: list[str], folder: Path) -> None:
    with (folder / f"{command[0]}.out").open("wb") as out:
        process = subprocess.Popen([str(_path(command[0])), *command[1:]], stdout=out, stderr=out)

    def end() -> None:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)


def _end_jobs() -> None:
    """End what runs, while the daemons that do so are there."""
    subprocess.run(["scancel", "--user=root"], capture_output=True, timeout=60)
    end = time.monotonic() + 20
    while time.monotonic() < end and _told(["squeue", "--noheader"]).strip():
        time.sleep(0.5)


def _told(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def _put_back(before: str | None) -> None:
    os.environ.pop("SLURM_CONF")
    if before is not None:
        os.environ["SLURM_CONF"] = before


def _wait(ready: Callable[[], bool], folder: Path) -> None:
    end = time.monotonic() + SECONDS
    while not ready():
        if time.monotonic() > end:
            logs = "\n".join(f"{log}: {log.read_text()[-500:]}" for log in sorted(folder.glob("*.out")))
            raise RuntimeError(f"Slurm does not start here: {logs}")
        time.sleep(0.2)
