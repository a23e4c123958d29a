"""Progress bars of long commands: tqdm's, on the standard error stream, where that is a terminal.

TQDM_DISABLE=1 in the environment takes them away, TQDM_DISABLE=0 shows them in a log too. They follow the same switch
as those of transformers, datasets and the hub.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SWITCH = "TQDM_DISABLE"


def are_hidden() -> bool:
    """Whether there are to be no bars."""
    switch = os.environ.get(SWITCH, "")
    return switch.lower() not in ("0", "false") if switch else not sys.stderr.isatty()


def bar(items: Iterable[Item], what: str, **more: Any) -> tqdm[Item]:
    """The items, with a bar that says what is done with them; it leaves nothing behind when it ends."""
    return tqdm(items, **_settings(what), **more)


def counter(total: int, what: str, **more: Any) -> tqdm[Any]:
    """A bar that is moved by its `update`, in a `with` block."""
    return tqdm(total=total, **_settings(what), **more)


def _settings(what: str) -> dict[str, Any]:
    return {"desc": what, "file": sys.stderr, "disable": are_hidden(), "leave": False, "dynamic_ncols": True}
