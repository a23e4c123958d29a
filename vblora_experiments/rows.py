"""The numbers of an experiment as one table: a row for each model and method."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


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
        if name.count("/") != 1:
            example = f"{next(iter(self.models))}/{list(self.methods)[-1]}"
            raise ValueError(f"a row is MODEL/METHOD, for example {example}, not {name!r}")
        model, method = name.split("/")
        check_names("model", [model], list(self.models))
        check_names("method", [method], list(self.methods))
        return {
            "model_name_or_path": self.models[model].name_or_path,
            **self.common,
            **self.models[model].flags,
            **self.methods[method],
            **self.methods_of_models.get((model, method), {}),
        }

    def main(self, script: str, arguments: Sequence[str] | None = None) -> int:
        """The command that prints one row as flags, one per line."""
        arguments = sys.argv[1:] if arguments is None else arguments
        usage = f"usage: {script} MODEL/METHOD"
        names = f"models: {', '.join(self.models)}; methods: {', '.join(self.methods)}"
        if list(arguments) in (["-h"], ["--help"]):
            print(usage + "\n" + names.replace("; ", "\n"))
            return 0
        try:
            if len(arguments) != 1:
                raise ValueError(f"{usage}; {names}")
            flags = self.row(arguments[0])
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
