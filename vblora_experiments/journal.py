"""What became of a run, in a file beside its log: one line of JSON when it starts and one when it ends.

It is added to by whoever runs the command, on whatever machine, and read by those who wait for it or watch. (The
standard library alone: workers of a cluster load this.)
"""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """One process that ran a run's command.

    Attributes:
        host: the machine's name.
        process: its number there, of the command or of who runs it.
        began: seconds since 1970.
        step: of the checkpoint that was there.
        code: the exit code (below 0: the signal that ended it); None while it goes on, or where nobody saw its end.
        ended: seconds since 1970.
    """

    host: str
    process: int
    began: float
    step: int
    code: int | None = None
    ended: float | None = None


def path_of(log: Path) -> Path:
    """The journal of the run with this log."""
    return log.with_suffix(".jsonl")


def started(log: Path, process: int) -> None:
    """Note that the command of a run has been started: its folder is beside its log."""
    step = last_step(log.with_suffix(""))
    _add(log, {"host": platform.node(), "process": process, "began": round(time.time(), 3), "step": step})


def ended(log: Path, code: int) -> None:
    """Note that the command that was started last has ended."""
    _add(log, {"code": code, "ended": round(time.time(), 3)})


def attempts(log: Path) -> list[Attempt]:
    """All starts so far; a line that was cut off, as on a full disk, does not count."""
    found: list[dict[str, Any]] = []
    path = path_of(log)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError, RecursionError):
            event = json.loads(line)
            if "began" in event:
                found.append(event)
            elif found and "code" in event:
                found[-1] |= event
    with suppress(TypeError):
        return [Attempt(**event) for event in found]
    raise ValueError(f"{path} is damaged: remove it")


def last_step(folder: Path) -> int:
    """Of the newest checkpoint in a run's folder; 0 without any."""
    ends = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
    return max((int(end) for end in ends if end.isdecimal()), default=0)


def _add(log: Path, event: dict[str, Any]) -> None:
    """Add a line, on a new one also where the last was cut off. A full disk must not end a run: it is left out then."""
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path_of(log), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, f"\n{json.dumps(event)}\n".encode("ascii"))
        finally:
            os.close(handle)
