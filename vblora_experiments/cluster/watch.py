"""What the runs of a campaign are doing: their states, scores so far and time left, from the files of their folders."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vblora.io import read_json
from vblora_experiments import journal, runs, tables

POLL = 5.0  # seconds between two tables on a terminal
CLEAR = "\x1b[H\x1b[2J"
HEADER = ("run", "state", "step", "scores so far", "left")
GOING = ("running", "waiting")


@dataclass(frozen=True)
class Seen:
    """A run as it is now.

    Attributes:
        name: of its folder.
        state: "done", "running", "waiting ...", or why it is none of these.
        step, steps: of its training; 0 of 0 before the first checkpoint.
        scores: of its last evaluation, or of its record.
        left: seconds; None where nothing is known of it.
    """

    name: str
    state: str
    step: int = 0
    steps: int = 0
    scores: str = ""
    left: float | None = None


def watch(look: Callable[[], Sequence[Seen]], out: Any = None) -> None:
    """Show the table again and again until no run is going or waiting; once, where the output is no terminal."""
    out = sys.stdout if out is None else out
    while True:
        seen = look()
        print(f"{CLEAR if out.isatty() else ''}{render(seen)}", file=out, flush=True)
        if not out.isatty() or not any(run.state.startswith(GOING) for run in seen):
            return
        time.sleep(POLL)


def render(seen: Sequence[Seen]) -> str:
    """The table, and below it how many runs are in which state."""
    lines = [
        [run.name, run.state, f"{run.step}/{run.steps}" if run.steps else "", run.scores, left(run)] for run in seen
    ]
    counts = Counter(run.state.split(" (")[0] for run in seen)
    words = ", ".join(f"{count} {state}" for state, count in counts.items())
    return tables.render(HEADER, lines, "markdown", [f"{len(seen)} runs: {words}"])


def left(run: Seen) -> str:
    """The time that a run still needs, in words."""
    if run.left is None or run.state == "done":
        return ""
    return f"{run.left / 3600:.1f} h" if run.left >= 3600 else f"{run.left / 60:.0f} min"


def see(name: str, folder: Path, record: Mapping[str, Any] | None, queued: str | None, minutes: float | None) -> Seen:
    """A run that is kept in a folder.

    Args:
        name: of its folder.
        folder: that all runs are kept in.
        record: of the run, where it is finished.
        queued: what the cluster says of it; None where it is in no queue.
        minutes: that such a run takes, where that is known.
    """
    if record is not None:
        return Seen(name, "done", scores=_of_record(record["scores"]))
    attempts = journal.attempts(folder / f"{name}.log")
    state = queued or _state(attempts[-1] if attempts else None)
    training = _training(folder / name)
    step, steps = int(training.get("global_step", 0)), int(training.get("max_steps", 0))
    per_step = _seconds_per_step(folder / name, attempts, step)
    remaining = None if minutes is None else 60 * minutes * (1 - step / steps if steps else 1)
    if per_step is not None:
        remaining = per_step * (steps - step)
    return Seen(name, state, step, steps, _of_log(training.get("log_history", [])), remaining)


def _state(last: journal.Attempt | None) -> str:
    """Of a run that is in no queue and has no record."""
    if last is None:
        return "not begun"
    if last.code is None:
        here = last.host == platform.node()
        return "running" if here and _is_alive(last.process) else f"interrupted on {last.host}"
    return f"failed (exit code {last.code})" if last.code else "ended without the record of this row"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _training(folder: Path) -> dict[str, Any]:
    """What the trainer said of itself at the newest whole checkpoint."""
    checkpoint = runs.last_checkpoint(folder)
    try:
        return read_json(Path(checkpoint) / "trainer_state.json") if checkpoint else {}
    except ValueError:  # the run has just taken it away
        return {}


def _seconds_per_step(folder: Path, attempts: Sequence[journal.Attempt], step: int) -> float | None:
    """As the attempt that is under way has needed up to its newest checkpoint, its start and evaluations in it."""
    file = folder / f"checkpoint-{step}" / "trainer_state.json"
    if not attempts or step <= attempts[-1].step or not file.exists():
        return None
    return max(0.0, file.stat().st_mtime - attempts[-1].began) / (step - attempts[-1].step)


def _of_log(history: Sequence[Mapping[str, Any]]) -> str:
    """The last evaluation in the trainer's log."""
    for entry in reversed(history):
        if found := {n.removeprefix("eval_"): v for n, v in entry.items() if n.startswith("eval_") and _is_score(n)}:
            return _in_words(found) + (f" (epoch {entry['epoch']:g})" if "epoch" in entry else "")
    return ""


def _of_record(scores: Mapping[str, Any]) -> str:
    """Of GLUE the task's metric at the best epoch; else all numbers."""
    if "metric" in scores and "best" in scores:
        return _in_words({scores["metric"]: scores["best"][scores["metric"]]})
    return _in_words(scores)


def _is_score(name: str) -> bool:
    return not name.endswith(("_runtime", "_per_second", "_time"))


def _in_words(scores: Mapping[str, Any]) -> str:
    numbers = {n: v for n, v in scores.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
