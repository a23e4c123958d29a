"""What this machine's scheduler takes of a run: the time between two runs that wait for one place.

    python benchmarks/scheduling.py [--runs 20] [--rounds 5] [--record results/speed/scheduling.json]

Each run is a shell that prints the time at its start and end and sleeps in between. What `schedule.run_all` takes
beyond that is per run: the process that ties it to its campaign, the log, the journal, and until its end is seen.
Beside it the same commands one after the other by `subprocess.run`. Of a run of a minute 0.6 seconds are 1%.

Last result (results/speed/scheduling.json, two busy cores): 0.20 seconds a run, 0.33% of a minute.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from turns import parser, report, require_positive, take_turns

from vblora_experiments import commands, schedule

RUN = ["sh", "-c", "date +%s.%N; sleep 0.2; date +%s.%N"]
SCHEDULED, ALONE = "schedule.run_all", "subprocess.run"
MINUTE = 60.0


def main(arguments: list[str]) -> None:
    options_of = parser(__doc__, rounds=5)
    options_of.add_argument("--runs", type=int, default=20, help="of one round")
    options = options_of.parse_args(arguments)
    require_positive(options, "runs", "rounds")
    ways = {SCHEDULED: lambda: scheduled(options.runs), ALONE: lambda: alone(options.runs)}
    seconds = take_turns(ways, options.rounds)
    found = {name: {"seconds": median(s), "of_a_minute": median(s) / MINUTE} for name, s in seconds.items()}
    spread = {name: [min(s), max(s)] for name, s in seconds.items()}
    figures = {"runs": options.runs, "rounds": options.rounds, "per_run": found, "least_and_most": spread}
    report("scheduling", figures, render(figures), options.record)


def scheduled(runs: int) -> float:
    """Seconds beyond the runs' own, for each of them."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [schedule.Job(f"run{n}", RUN, Path(folder) / f"run{n}.log") for n in range(runs)]
        began = time.monotonic()
        failed = schedule.run_all(jobs, [{}], lambda line: None)
        whole = time.monotonic() - began
        if failed:
            raise ValueError(f"the shell does not run: {jobs[0].log.read_text()}")
        return (whole - sum(_own(job.log.read_text()) for job in jobs)) / runs


def alone(runs: int) -> float:
    began = time.monotonic()
    said = [subprocess.run(RUN, capture_output=True, text=True, check=True).stdout for _ in range(runs)]
    return (time.monotonic() - began - sum(map(_own, said))) / runs


def _own(said: str) -> float:
    """Seconds between the two times that a run prints."""
    first, last = map(float, said.split())
    return last - first


def render(found: dict[str, Any]) -> str:
    lines = ["| | ms a run | least and most | of a run of a minute |", "| --- | ---: | ---: | ---: |"]
    for name in (SCHEDULED, ALONE):
        one, (least, most) = found["per_run"][name], found["least_and_most"][name]
        shown = f"{1000 * least:.0f} to {1000 * most:.0f}"
        lines.append(f"| {name} | {1000 * one['seconds']:.0f} | {shown} | {100 * one['of_a_minute']:.2f}% |")
    return "\n".join(lines)


if __name__ == "__main__":
    commands.run(main, "scheduling")
