"""What is seen of many runs on a terminal: a bar over all of them, and below it the bar of each that is under way.

A run writes its bars to its log, as its output is one, and here the last one is read from there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vblora_experiments import bars, schedule

EVERY = "2"  # seconds between two lines of a bar in a log
BETWEEN = 0.5  # seconds between two looks at the logs
TAIL = 4096  # bytes at a log's end in which a bar is looked for


class Board:
    """Bars for `schedule.run_all` in a `with` block, or its lines alone where there are to be no bars."""

    def __init__(self, total: int) -> None:
        self.hidden = bars.are_hidden()
        self._all = bars.counter(total, "runs", position=0)
        self._next = 0.0
        self._of_place: dict[int, tqdm[Any]] = {}
        self._begins: dict[Path, int] = {}  # where in its log a run has begun: an earlier try may be before

    @property
    def environment(self) -> dict[str, str]:
        """What the runs are told, so that they write their bars."""
        return {} if self.hidden else {bars.SWITCH: "", "TQDM_MININTERVAL": EVERY}

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: Any) -> None:
        for bar in (*self._of_place.values(), self._all):
            bar.close()

    def say(self, line: str) -> None:
        """A line above the bars."""
        if self.hidden:
            schedule.say_progress(line)
        else:
            tqdm.write(line, file=sys.stderr)

    def look(self, running: Mapping[int, schedule.Job], ended: int) -> None:
        """Move the bars to where the runs are."""
        if self.hidden or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + BETWEEN
        self._all.update(ended - self._all.n)
        for place in self._of_place.keys() - running.keys():
            self._of_place.pop(place).close()
        for place, job in running.items():
            if place not in self._of_place:
                self._of_place[place] = bars.counter(0, job.name, position=place + 1, bar_format=OF_RUN)
            self._show(self._of_place[place], job)

    def _show(self, bar: tqdm[Any], job: schedule.Job) -> None:
        if not job.log.exists():
            return
        begins = self._begins.setdefault(job.log, job.log.stat().st_size)
        what, bar.n, bar.total = last_bar(job.log, begins) or ("", 0, 0)
        bar.set_description_str(f"{job.name}, {what}" if what else job.name, refresh=False)
        bar.refresh()


OF_RUN = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}]"


def last_bar(log: Path, begins: int = 0) -> tuple[str, int, int] | None:
    """What the last bar in a log says: of what, how much is done, of how much; None where there is none.

    Args:
        log: of a run.
        begins: the byte from which on it is looked for.
    """
    with log.open("rb") as file:
        file.seek(max(begins, log.stat().st_size - TAIL))
        text = file.read().decode(errors="replace")
    for line in reversed(text.splitlines()):
        if found := schedule.BAR.search(line):
            return (found["what"] or "").replace(schedule.UP, "").strip(), int(found["done"]), int(found["total"])
    return None
