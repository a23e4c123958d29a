"""The memory that a piece of work takes, as PyTorch's own allocator counts it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of tensors that a call holds at once beyond those there were before it.

    On a GPU from the allocator's own count (of the current device); on the CPU from the profiler, which sees each
    allocation. What libraries take by other ways is not in it.
    """
    gc.collect()  # or what is freed of before would be taken off
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
    held = most = 0
    events: list[Any] = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
