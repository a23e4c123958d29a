"""What decides the result of a run: read from its command line and its training arguments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from vblora_experiments.records import FREE_TO_CHANGE, NEUTRAL
from vblora_experiments.secrets import without_secrets

# Training arguments that a plan has even where they are at their default.
ALWAYS = ("seed", "learning_rate", "num_train_epochs", "weight_decay")


def split(arguments: list[str]) -> list[str]:
    """The arguments with "--flag=value" in two."""
    return [part for a in arguments for part in (a.split("=", 1) if a.startswith("--") else [a])]


def with_row(arguments: list[str], row: Callable[[str], Mapping[str, Any]]) -> list[str]:
    """The flags of the row that --row names, if any, in front of all others, so that those override them."""
    arguments = split(arguments)
    if "--row" not in arguments:
        return arguments
    at = arguments.index("--row")
    flags = row(arguments[at + 1] if at + 1 < len(arguments) else "")
    return [part for flag, value in flags.items() for part in (f"--{flag}", str(value))] + arguments


def overrides(arguments: list[str]) -> dict[str, str]:
    """What was given beside --row, the seed and what does not decide the result: empty for the table's own run."""
    parts = split(arguments)
    values: dict[str, str] = {}
    for flag, value in zip(parts, [*parts[1:], "--"], strict=True):
        if flag.startswith("--"):
            values[flag.removeprefix("--").replace("-", "_")] = "true" if value.startswith("--") else value
    return without_secrets({flag: value for flag, value in values.items() if flag not in NEUTRAL})


def chosen(training: Any) -> dict[str, Any]:
    """The training arguments that are not at their default, and those that decide the result.

    Raises:
        ValueError: a rate that is no finite number of at least 0.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(training)}
    values = {name: getattr(training, name) for name in defaults}
    for name in ("learning_rate", "weight_decay"):
        if not 0 <= values[name] < math.inf:
            raise ValueError(f"--{name} must be a number of at least 0, not {values[name]:g}")
    kinds = (str, int, float, bool, dict, list)
    plain = {n: v for n, v in values.items() if isinstance(v, kinds) and n not in FREE_TO_CHANGE}
    return without_secrets({n: getattr(v, "value", v) for n, v in plain.items() if n in ALWAYS or v != defaults[n]})


def defaults() -> dict[str, Any]:
    """The training arguments at their defaults, which a plan leaves out."""
    from transformers import TrainingArguments  # takes seconds

    found = {f.name: getattr(f.default, "value", f.default) for f in dataclasses.fields(TrainingArguments)}
    return {name: value for name, value in found.items() if isinstance(value, (str, int, float, bool))}
