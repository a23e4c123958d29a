"""The numbers of an experiment as one table: a row for each model and method."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Learning rates of VB-LoRA in all the paper's experiments (Tables 7, 8 and 9).
PAPER_LR_VECTOR_BANK = 1e-3
PAPER_LR_LOGITS = 1e-2
# VB-LoRA in all the paper's experiments; a table adds the bank's size and what differs. The bank starts uniform between
# plus and minus its bound.
VBLORA: dict[str, Any] = {
    "method": "vblora",
    "rank": 4,
    "topk": 2,
    "vector_length": 256,
    "init_vector_bank_bound": 0.02,
    "learning_rate_vector_bank": PAPER_LR_VECTOR_BANK,
    "learning_rate_logits": PAPER_LR_LOGITS,
}


@dataclass(frozen=True)
class Model:
    """A model by its name on the hub, and the flags in which its rows differ from the common ones."""

    name_or_path: str
    flags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """The flags of each MODEL/METHOD: the later of these go before the earlier.

    Attributes:
        common: of all rows.
        models: by name.
        methods: by name.
        methods_of_models: where a method's own setting depends on the model.
    """

    common: Mapping[str, Any]
    models: Mapping[str, Model]
    methods: Mapping[str, Mapping[str, Any]]
    methods_of_models: Mapping[tuple[str, str], Mapping[str, Any]]

    def row(self, name: str) -> dict[str, Any]:
        """The flags of one row, by name.

        Raises:
            ValueError: there is no such row.
        """
        model, method = parts_of(name, self.names)
        return {
            "model_name_or_path": self.models[model].name_or_path,
            **self.common,
            **self.models[model].flags,
            **self.methods[method],
            **self.methods_of_models.get((model, method), {}),
        }

    @property
    def names(self) -> dict[str, list[str]]:
        """The names of models and of methods."""
        return {"model": list(self.models), "method": list(self.methods)}

    def main(self, script: str, arguments: Sequence[str] | None = None) -> int:
        """The command that prints one row as flags, one per line."""
        return print_row(script, self.row, self.names, arguments)


def parts_of(name: str, known: Mapping[str, Sequence[str]]) -> list[str]:
    """The parts of a row's name, of which `known` has the possible ones, by what they are.

    Raises:
        ValueError: another number of parts, or one that is not known.
    """
    parts = name.split("/")
    if len(parts) != len(known):
        example = "/".join([*(names[0] for names in list(known.values())[:-1]), list(known.values())[-1][-1]])
        raise ValueError(f"a row is {'/'.join(known).upper()}, for example {example}, not {name!r}")
    for (what, names), part in zip(known.items(), parts, strict=True):
        check_names(what, [part], names)
    return parts


def print_row(
    script: str,
    row: Callable[[str], Mapping[str, Any]],
    known: Mapping[str, Sequence[str]],
    arguments: Sequence[str] | None = None,
) -> int:
    """A script's whole work: print the row that its argument names as flags, one per line; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    usage = f"usage: {script} {'/'.join(known).upper()}"
    lines = [f"{what}s: {', '.join(names)}" for what, names in known.items()]
    if list(arguments) in (["-h"], ["--help"]):
        print("\n".join([usage, *lines]))
        return 0
    try:
        if len(arguments) != 1:
            raise ValueError(f"{usage}; {'; '.join(lines)}")
        flags = row(arguments[0])
    except ValueError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    for name, value in flags.items():
        print(f"--{name} {value}")
    return 0


def check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names that are not known.

    Raises:
        ValueError: naming the first of them.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
