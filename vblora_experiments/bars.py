"""Progress bars of long commands: tqdm's, on the standard error stream, where that is a terminal.

TQDM_DISABLE in the environment is tqdm's own switch, for transformers' bars too: with any text (1, and 0 as well) it
takes them away, and set to nothing (TQDM_DISABLE=) it shows them in a log too. A script's `--disable_tqdm true` takes
them away in its run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SWITCH = "TQDM_DISABLE"
_of_run: list[bool] = []  # what --disable_tqdm says of the run that this process is at


def follow(hidden: bool) -> None:
    """From now on there are bars, or none, whatever the output is."""
    _of_run[:] = [hidden]


def are_hidden() -> bool:
    """Whether there are to be no bars."""
    if _of_run:
        return _of_run[0]
    switch = os.environ.get(SWITCH)
    return not sys.stderr.isatty() if switch is None else bool(switch)


def bar(items: Iterable[Item], what: str, **more: Any) -> tqdm[Item]:
    """The items, with a bar that says what is done with them; it leaves nothing behind when it ends."""
    return tqdm(items, **_settings(what), **more)


def counter(total: int, what: str, **more: Any) -> tqdm[Any]:
    """A bar that is moved by its `update`, in a `with` block."""
    return tqdm(total=total, **_settings(what), **more)


def _settings(what: str) -> dict[str, Any]:
    return {"desc": what, "file": sys.stderr, "disable": are_hidden(), "leave": False, "dynamic_ncols": True}
