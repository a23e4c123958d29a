"""What the benchmarks share: ways that take turns, medians of ratios, and the options all of them have.

The ways take turns within each round, so that what else the machine does hits all of them. A figure is the median over
the rounds: of the seconds, or of the ratio to one of the ways in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vblora.io import write_json
from vblora_experiments import bars
from vblora_experiments.records import environment

Seconds = dict[str, list[float]]  # of each way, round by round


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with the module's docstring as its description, --rounds and --record."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"each way is timed so often ({rounds})")
    made.add_argument("--record", type=Path, help="write the figures to this file too")
    return made


def require_positive(options: argparse.Namespace, *flags: str) -> None:
    """Raise ValueError for the first of these flags (lists too) that is below 1."""
    for flag in flags:
        value = getattr(options, flag)
        for number in value if isinstance(value, list) else [value]:
            if number < 1:
                raise ValueError(f"--{flag} must be at least 1, not {number}")


def take_turns(ways: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> Seconds:
    """What each way returns, its seconds, in every round but the first `warm_up`."""
    seconds: Seconds = {name: [] for name in ways}
    for turn in bars.bar(range(rounds + warm_up), "rounds"):
        for name, way in ways.items():
            taken = way()
            if turn >= warm_up:
                seconds[name].append(taken)
    return seconds


def medians(seconds: Seconds) -> dict[str, float]:
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def ratios(seconds: Seconds, to: str) -> dict[str, float]:
    """The median of each way's ratios to the way `to` in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(taken, seconds[to], strict=True))
        for name, taken in seconds.items()
    }


def timed(function: Callable[[], Any]) -> float:
    """Seconds that one call takes, on a GPU until it is done."""
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def report(name: str, found: Mapping[str, Any], text: str, record: Path | None) -> None:
    """Print a benchmark's text, and write it with the figures if a file for them is given."""
    print(text)
    if record is not None:
        write_json(record, {"benchmark": name, **found, "printed": text.split("\n"), **environment()})
