"""Loading what may come from the hub, and a way out where the hub is out of reach."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from vblora.files.remote import in_reach as hub_in_reach

Loaded = TypeVar("Loaded")


def from_hub(load: Callable[[], Loaded], what: str, flag: str) -> Loaded:
    """Load a model or data set that may come from the hub; say which flag to use where it cannot be had.

    Args:
        load: does the loading.
        what: the local path or the name on the hub.
        flag: the flag, with its argument, that a user without the hub needs.

    Raises:
        ValueError: `what` is no local path and the hub is out of reach or does not have it, or it is a local
            path and does not hold what it should.
    """
    local = Path(what).exists()
    reachable = local or hub_in_reach()
    try:
        with contextlib.nullcontext() if reachable else _cache_only():
            return load()
    except (OSError, ValueError, RuntimeError) as error:
        why = str(error).split("\n")[0]
        if not reachable:
            why = f"the hub cannot be reached, and its cache has no copy that loads ({why})"
        raise ValueError(f"{what}: {why}" + ("" if local else f"; without the hub use {flag}")) from error


@contextlib.contextmanager
def _cache_only() -> Iterator[None]:
    """Let the libraries look into their cache only: left alone, they try an absent hub for most of a minute."""
    import huggingface_hub.constants

    modules: list[Any] = [huggingface_hub.constants]
    if importlib.util.find_spec("datasets") is not None:
        import datasets

        modules.append(datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
