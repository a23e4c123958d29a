"""A campaign on a cluster: its runs are queued, and followed until they have ended.

The runs belong to the cluster: they go on when the process that queued them ends, and the same command finds them
again. A run that is in the queue is not queued twice, and one that was lost goes on from its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from vblora_experiments import journal, schedule
from vblora_experiments.schedule import Job

POLL = 5.0  # seconds between two looks at the queue
GRACE = 60.0  # seconds until what a worker wrote last is seen here: NFS keeps what it knows of a folder so long
NAMES = ("slurm", "ray")


class Cluster(Protocol):
    """What is asked of a cluster, of the runs of one folder."""

    def submit(self, jobs: Sequence[Job]) -> int:
        """Queue the jobs that are not in the queue, each behind those it waits for; how many were queued.

        Raises:
            ValueError: the cluster refuses them.
        """

    def queued(self) -> dict[str, str]:
        """The runs that have not ended, by name: "running", or "waiting" with what for."""

    def stop(self) -> None:
        """End the runs and take them out of the queue."""


def opened(name: str, folder: Path, settings: Any) -> Cluster:
    """The cluster of this name, for the runs that are kept in a folder.

    Raises:
        ValueError: its library or its programs are not here, or it does not answer.
    """
    if name == "slurm":
        from vblora_experiments.cluster.on_slurm import Slurm

        return Slurm(folder, settings)
    from vblora_experiments.cluster.on_ray import Ray

    return Ray(folder, settings)


def run_all(cluster: Cluster, jobs: Sequence[Job], say: Callable[[str], None] = schedule.say_progress) -> list[str]:
    """Queue all jobs and wait until they have ended, saying what changes; the names of those that failed.

    An interruption leaves the runs on the cluster as they are.
    """
    fresh = cluster.submit(jobs)
    say(f"{fresh} runs queued, {len(jobs) - fresh} were in the queue; they go on without this process")
    left, states, gone = {job.name: job for job in jobs}, dict[str, str](), dict[str, float]()
    failed: list[str] = []
    while left:
        queued = cluster.queued()
        for name, job in list(left.items()):
            if name not in queued and not _is_settled(job, failed) and _waited(gone, name) < GRACE:
                continue
            if (state := queued.get(name) or outcome(job, failed)) != states.get(name):
                say(f"{name}: {state}")
                states[name] = state
            if name not in queued:
                del left[name]
                failed += [] if state.startswith("done") else [name]
        if left:
            time.sleep(POLL)
    if not cluster.queued():  # of other commands neither
        cluster.stop()
    return failed


def outcome(job: Job, failed: Sequence[str] = ()) -> str:
    """What became of a run that is not in the queue any more."""
    if any(name in failed for name in job.after):
        return f"left out, as {', '.join(name for name in job.after if name in failed)} failed"
    attempts = journal.attempts(job.log)
    if not attempts:
        said = schedule.last_line(job.log)
        return (
            f"FAILED: no worker wrote that it began it; {said}; what the cluster says is in {job.log.parent}/.cluster"
        )
    last = attempts[-1]
    if last.code is None or last.ended is None:
        return f"FAILED: lost on {last.host}, {job.log}: {schedule.last_line(job.log)}"
    what = "done" if last.code == 0 else f"FAILED (exit code {last.code}, {job.log})"
    return f"{what} after {(last.ended - last.began) / 60:.1f} min on {last.host}: {schedule.last_line(job.log)}"


def _is_settled(job: Job, failed: Sequence[str]) -> bool:
    """Whether it is known what became of the run; else its worker's last words may be still on their way."""
    attempts = journal.attempts(job.log)
    return bool(attempts and attempts[-1].code is not None) or any(name in failed for name in job.after)


def _waited(gone: dict[str, float], name: str) -> float:
    """Seconds since the run was first seen to be out of the queue."""
    return time.monotonic() - gone.setdefault(name, time.monotonic())
