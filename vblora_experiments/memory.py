"""The memory that a piece of work takes, as PyTorch's own allocator counts it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of tensors that a call holds at once beyond those there were before it.

    On a GPU from the allocator's own count (of the current device); on the CPU from the profiler, which sees each
    allocation: there what the call frees of before is not taken off. What libraries take by other ways is not in it.
    """
    gc.collect()  # or what is freed of before would be taken off; and its next turn comes after as many objects
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return _most_held(profiler.profiler.kineto_results.experimental_event_tree())


def _most_held(roots: Iterable[Any]) -> int:
    """The most bytes held at once, of what was allocated while the profiler looked.

    PyTorch gives a size to whatever is freed at an address that any earlier profile has seen, so what is freed without
    an allocation in this one depends on what the process did before. It is left out.
    """
    sizes: dict[int, int] = {}  # by address
    held = most = 0
    for event in sorted(_allocations(roots), key=lambda e: e.start_time_ns):
        address, size = event.typed[1].ptr, event.typed[1].alloc_size
        held -= sizes.pop(address, 0)
        if size > 0:
            sizes[address] = size
            held += size
        most = max(most, held)
    return most


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        if event.name == "[memory]":
            yield event
        yield from _allocations(event.children)
