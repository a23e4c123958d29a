"""Many runs, spread over the devices there are: one process for each device at a time."""

from __future__ import annotations

import graphlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vblora_experiments import journal

POLL = 0.1  # seconds between two looks at the running processes: a run's end is seen so much later at most
BAR = re.compile(r"(?:(?P<what>[^|%]*): +)?\d+%\|[^|]*\| *(?P<done>\d+)/(?P<total>\d+) \[")  # as tqdm writes one
UP = "\x1b[A"  # what follows the bars that stand below others
FULL = 2**16  # bytes: with fewer free a disk counts as full


@dataclass
class Job:
    """A command to run, and the jobs (by name) that must have ended well before it can start."""

    name: str
    command: list[str]
    log: Path
    after: list[str] = field(default_factory=list)


def devices(jobs: int | None) -> list[dict[str, str]]:
    """The environment of each process that may run at a time.

    With GPUs, one process for each (`jobs` takes fewer); else `jobs` processes (1 unless given) that share the cores.
    Where OMP_NUM_THREADS is set, each has as many threads as it says.

    Raises:
        ValueError: more jobs than GPUs, or fewer than one.
    """
    import torch

    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {jobs}")
    gpus = _visible_gpus(torch.cuda.device_count()) if torch.cuda.is_available() else []
    if gpus:
        if jobs is not None and jobs > len(gpus):
            raise ValueError(f"--jobs {jobs}, but there are {len(gpus)} GPUs: one process runs on each")
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:jobs]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = jobs or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))
    return [{"OMP_NUM_THREADS": threads} for _ in range(count)]


def _visible_gpus(count: int) -> list[str]:
    """The names of the GPUs that CUDA sees, of which there are `count`: it stops at the first name it does not know."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(count)] if visible is None else [n.strip() for n in visible.split(",")]
    known = list(itertools.takewhile(lambda name: name not in ("", "-1"), names))
    return list(dict.fromkeys(known))[:count]


def in_order(after: Mapping[str, Sequence[str]]) -> list[str]:
    """The names of jobs, each behind those of them that it waits for."""
    order = graphlib.TopologicalSorter({name: [a for a in before if a in after] for name, before in after.items()})
    return list(order.static_order())


def say_progress(line: str) -> None:
    """A line on the standard error stream, at once: the standard output is the table's."""
    print(line, file=sys.stderr, flush=True)


def run_all(
    jobs: Sequence[Job],
    places: Sequence[dict[str, str]],
    say: Callable[[str], None] = say_progress,
    look: Callable[[Mapping[int, Job], int], None] = lambda running, ended: None,
) -> list[str]:
    """Run all jobs, each as soon as a place is free and what it waits for has ended well.

    The output of a job goes to its log; its last line is said when it ends. A job that fails does not stop the others,
    but those that wait for it are left out. An interruption stops all.

    Args:
        jobs: to run.
        places: the environment of each process that may run at a time.
        say: is told what starts and ends, in lines.
        look: is shown again and again the running jobs by their places, and how many have ended.

    Returns:
        The names of the jobs that failed or were left out.
    """
    waiting, running = list(jobs), dict[int, tuple[Job, subprocess.Popen[bytes], float]]()
    ended: dict[str, bool] = {}
    try:
        while waiting or running:
            for job in [j for j in waiting if any(ended.get(name) is False for name in j.after)]:
                waiting.remove(job)
                ended[job.name] = False
                say(f"{job.name}: left out, as {', '.join(job.after)} failed")
            free = [place for place in range(len(places)) if place not in running]
            own = {job.name for job in jobs}
            ready = [j for j in waiting if all(ended.get(name) or name not in own for name in j.after)]
            for place, job in zip(free, ready, strict=False):
                waiting.remove(job)
                running[place] = (job, _start(job, places[place]), time.monotonic())
                say(f"{job.name}: started ({len(waiting)} waiting)")
            time.sleep(POLL)
            look({place: job for place, (job, _, _) in running.items()}, len(ended))
            for place, (job, process, began) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[place]
                journal.ended(job.log, code)
                ended[job.name] = code == 0
                minutes = (time.monotonic() - began) / 60
                what = "done" if code == 0 else f"FAILED (exit code {code}, {job.log})"
                say(f"{job.name}: {what} after {minutes:.1f} min: {last_line(job.log)}")
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
    return [name for name, well in ended.items() if not well]


# Says to Linux that the process is to end when its parent does, however that came, and becomes the job's command.
TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, which outlasts exec
if os.getppid() != int(sys.argv[1]):  # it has ended before
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def tied(command: list[str]) -> list[str]:
    """The command, which does not outlive this process where the system is Linux; elsewhere as it is."""
    return [sys.executable, "-c", TIED, str(os.getpid()), *command] if sys.platform == "linux" else command


def _start(job: Job, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            tied(job.command),
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    journal.started(job.log, process.pid)
    return process


def last_line(log: Path) -> str:
    """Of what a job has printed, bars aside; on a full disk that may be nothing."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.replace(UP, "").strip() and not BAR.search(line)]
    if lines:
        return lines[-1]
    full = log.parent.exists() and shutil.disk_usage(log.parent).free < FULL
    return f"(no output: the disk of {log.parent} is full)" if full else "(no output)"
