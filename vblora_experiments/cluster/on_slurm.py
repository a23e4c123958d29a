"""Runs as jobs of Slurm, in arrays, through submitit."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vblora.io import read_json, write_json
from vblora_experiments import journal
from vblora_experiments.cluster.settings import SlurmSettings
from vblora_experiments.cluster.worker import Work
from vblora_experiments.progress import alone
from vblora_experiments.schedule import Job, in_order

TIMEOUT = 60  # seconds that a command of Slurm's may take
FOLDER = Path(".cluster") / "slurm"  # in the folder of the runs
COLUMNS = "%j|%K|%F|%T|%r"


class Slurm:
    """Slurm's queue, of the runs of one folder.

    Each array has a name of its own, which is written down with the names of its runs before it is queued: whoever
    asks later, also after a kill in between, finds a run by the name of its array and its place there.
    """

    def __init__(self, folder: Path, settings: SlurmSettings) -> None:
        if find_spec("submitit") is None:
            raise ValueError("--on slurm needs submitit: pip install submitit, or the extra: pip install -e '.[slurm]'")
        for program in ("sbatch", "squeue", "scancel", "srun"):
            if shutil.which(program) is None:
                raise ValueError(f"--on slurm: there is no {program} here: give this command where Slurm is")
        _told(["squeue", "--noheader", "--name=none"])  # a Slurm that does not answer is found before anything is said
        self.folder, self.settings = folder.absolute() / FOLDER, settings
        self.registry = self.folder / "runs.json"

    def submit(self, jobs: Sequence[Job]) -> int:
        with alone(self.registry, wait=True):
            known, ids = self._known(), self._ids()
            new = {job.name: job for job in jobs if job.name not in ids}
            for after, group in _groups(new, ids).items():
                name = f"vblora-{uuid.uuid4().hex[:12]}"
                known |= {job.name: [name, place] for place, job in enumerate(group)}
                write_json(self.registry, known)
                ids |= self._queue(name, group, [ids[start] for start in after])
        return len(new)

    def queued(self) -> dict[str, str]:
        states = self._squeue()
        return {run: _in_words(*states[place][1:]) for run, place in self._places().items() if place in states}

    def stop(self) -> None:
        if ids := self._ids():
            _told(["scancel", *ids.values()])

    def _known(self) -> dict[str, Any]:
        return read_json(self.registry) if self.registry.exists() else {}

    def _places(self) -> dict[str, tuple[str, int]]:
        """The array of each run and its place there."""
        try:
            return {run: (str(name), int(place)) for run, (name, place) in self._known().items()}
        except (TypeError, ValueError):
            raise ValueError(f"{self.registry} is damaged: remove it once no run of this folder is queued") from None

    def _squeue(self) -> dict[tuple[str, int], tuple[str, str, str]]:
        """Of each job that has not ended, by its array and its place there: its number, state and reason."""
        names = sorted({name for name, _ in self._places().values()})
        if not names:
            return {}
        lines = _told(["squeue", "--noheader", "--array", f"--name={','.join(names)}", f"--format={COLUMNS}"])
        found = {}
        for line in lines.splitlines():
            name, place, number, state, reason = (part.strip() for part in line.split("|", 4))
            is_array = place.isdecimal()
            found[name, int(place) if is_array else 0] = (f"{number}_{place}" if is_array else number, state, reason)
        return found

    def _ids(self) -> dict[str, str]:
        """The numbers of the runs that have not ended."""
        states = self._squeue()
        return {run: states[place][0] for run, place in self._places().items() if place in states}

    def _queue(self, name: str, jobs: Sequence[Job], after: Sequence[str]) -> dict[str, str]:
        """Queue the jobs as one array; their numbers."""
        import submitit

        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=self.settings.timeouts)
        for job in jobs:  # what became of it before is no more
            journal.path_of(job.log).unlink(missing_ok=True)
        try:
            executor.update_parameters(**self._parameters(name, after))
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises too
                queued = executor.submit_array([Work.of(job, self.settings.cpus) for job in jobs])
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise ValueError(f"--on slurm: {_refusal(str(error))}") from error
        return {job.name: one.job_id for job, one in zip(jobs, queued, strict=True)}

    def _parameters(self, name: str, after: Sequence[str]) -> dict[str, Any]:
        """Of submitit. A run that is preempted, or whose node is lost, is queued again by Slurm (requeue)."""
        own = self.settings
        asked: dict[str, Any] = {
            "partition": own.partition,
            "account": own.account,
            "time": max(1, round(own.hours * 60)),
            "gpus_per_node": own.gpus or None,
            "cpus_per_task": own.cpus,
            "mem": f"{round(own.memory_gb * 1024)}M" if own.memory_gb else None,
            "setup": own.setup or None,
            "dependency": f"afterok:{':'.join(after)}" if after else None,
        }
        return {name: value for name, value in asked.items() if value is not None} | {
            "job_name": name,
            "array_parallelism": own.at_a_time,
            "srun_args": [f"--cpus-per-task={own.cpus}"],  # srun does not take it from sbatch since Slurm 22.05
            "stderr_to_stdout": True,
            "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **own.options},
        }


def _groups(new: Mapping[str, Job], queued: Mapping[str, str]) -> dict[tuple[str, ...], list[Job]]:
    """The new jobs by what they wait for, of what is queued or new; each group behind those with its starts."""
    groups: dict[tuple[str, ...], list[Job]] = {}
    for name in in_order({name: job.after for name, job in new.items()}):
        after = tuple(sorted(a for a in new[name].after if a in new or a in queued))
        groups.setdefault(after, []).append(new[name])
    return groups


def _in_words(state: str, reason: str) -> str:
    if state == "PENDING":
        return f"waiting ({reason})" if reason not in ("", "None") else "waiting"
    return "running"


def _told(command: list[str]) -> str:
    """What a command of Slurm's prints.

    Raises:
        ValueError: it fails, or does not answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise ValueError(f"--on slurm: {command[0]} has not answered for {TIMEOUT} seconds") from None
    if done.returncode:
        raise ValueError(f"--on slurm: {_refusal(done.stderr)}")
    return done.stdout


def _refusal(text: str) -> str:
    """Slurm's own words in what a command of it printed."""
    words = re.findall(r"^\w+: (?:fatal|error): (.*)$", text, re.MULTILINE)
    lines = words or text.strip().splitlines() or ["Slurm refuses, and does not say why"]
    return "; ".join(dict.fromkeys(line.strip() for line in lines[-2:]))
