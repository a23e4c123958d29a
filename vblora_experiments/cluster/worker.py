"""What a worker of a cluster does: it runs the command of one job to its end.

(The standard library alone, so that a worker starts at once; submitit and Ray load this.)
"""

from __future__ import annotations

import os
import subprocess
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vblora_experiments import journal, schedule

LOCK_SECONDS = "180"  # beyond the 90 that an NFS server waits for a client that is gone, before it frees its locks


class Failed(Exception):
    """The command ended with an error of its own: it would do so again."""


class Stopped(Exception):
    """A signal ended the command, as where memory ran out or a machine goes: it goes on when it is started again."""


@dataclass(frozen=True)
class Work:
    """A job as a worker gets it.

    Attributes:
        command: of the run.
        log: what its output is added to.
        directory: where it runs.
        environment: what the command gets beside the worker's own.
    """

    command: list[str]
    log: Path
    directory: str
    environment: dict[str, str]

    @classmethod
    def of(cls, job: schedule.Job, cpus: int, environment: Mapping[str, str] = types.MappingProxyType({})) -> Work:
        """The job on so many cores: a run has as many threads, as on the machine of `--on local`."""
        own = {"OMP_NUM_THREADS": str(cpus), "VBLORA_LOCK_SECONDS": LOCK_SECONDS}
        return cls(job.command, job.log.absolute(), os.getcwd(), {**own, **environment})

    def __call__(self) -> None:
        """Run the command to its end, and note both in the run's journal.

        Raises:
            Failed, Stopped: it did not end well.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                schedule.tied(self.command),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env={**os.environ, **self.environment},
                start_new_session=True,  # submitit answers Slurm's signals, not the run
            )
        try:
            journal.started(self.log, process.pid)
            code = process.wait()
        except BaseException:  # submitit leaves a job that is to be queued again by SystemExit
            process.terminate()
            process.wait()
            raise
        journal.ended(self.log, code)
        if code:
            kind = Stopped if code < 0 else Failed
            raise kind(f"{self.log.stem}: exit code {code}: {schedule.last_line(self.log)}")

    def checkpoint(self) -> Any:
        """What submitit runs when the job is queued again: the same, which goes on from the run's last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
