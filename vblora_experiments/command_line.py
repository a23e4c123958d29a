"""What a run is told, and where each value comes from.

A script's flags are the fields of some dataclasses. A flag goes before the file of --config, that before the row that
--row names, and that before the defaults. With --recipe a row's numbers of VB-LoRA do not count. The file is YAML or
JSON, with the same names as the flags:

    row: minilm/cola/vblora_qv
    learning_rate_logits: 0.02
    bf16: true

A caller in Python tells the same values by their names (`Script.of`). At its start a run prints what it resolved, each
value with its source; --plan prints that and stops.
"""

from __future__ import annotations

import argparse
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import torch
from transformers import HfArgumentParser, TrainingArguments

from vblora.recipes import WARMUP
from vblora_experiments import bars, commands, runs
from vblora_experiments.arguments import OF_RECIPE, MethodArguments, split
from vblora_experiments.config_files import read_config
from vblora_experiments.secrets import is_secret

Part = TypeVar("Part")
FLAG, CALLER, DEFAULT, PLANNED = "flag", "caller", "default", "plan"
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "a map"}


@dataclass
class StartArguments:
    """What a run begins with."""

    row: str | None = field(default=None, metadata={"help": "take the flags of this row of the table of numbers"})
    config: str | None = field(
        default=None, metadata={"help": "take the flags in this file, .yaml or .json; other flags override them"}
    )
    plan: bool = field(default=False, metadata={"help": "print what the run resolves, and stop"})


@dataclass(frozen=True)
class Settings:
    """What a run was told.

    Attributes:
        script: the script's name.
        parts: one object for each dataclass of the script, with all values in them.
        sources: where a value comes from, by its name.
        overrides: the flags beside the row, as text: those that make another experiment of it.
    """

    script: str
    parts: tuple[Any, ...]
    sources: Mapping[str, str]
    overrides: dict[str, str]

    def of(self, kind: type[Part]) -> Part:
        """The object of this dataclass."""
        return next(part for part in self.parts if type(part) is kind)

    @property
    def output_dir(self) -> Path:
        return Path(str(self.of(TrainingArguments).output_dir))

    def show(self) -> bool:
        """Print the settings, by the first process of a run; whether that was all there is to do (--plan)."""
        training = self.of(TrainingArguments)
        bars.follow(bool(training.disable_tqdm) or training.process_index != 0)
        if training.process_index == 0:
            print(self.describe(), flush=True)
        return self.of(StartArguments).plan

    def describe(self) -> str:
        """The settings as a table for reading: name, value and source. Transformers' own defaults are left out."""
        lines = [line for part in self.parts for line in self._lines(part)]
        names, values = (max(len(line[at]) for line in lines) for at in (0, 1))
        values = min(values, 48)
        return "\n".join(
            [f"{self.script}: what this run resolves, and where each value comes from"]
            + [f"  {name:<{names}}  {value:<{values}}  {source}" for name, value, source in lines]
        )

    def _lines(self, part: Any) -> list[tuple[str, str, str]]:
        lines = []
        unset = part.unset() if isinstance(part, MethodArguments) else {}
        for one in fields(part):
            value, source = getattr(part, one.name), self.sources.get(one.name, "")
            if value is None and one.name in unset:
                value, source = unset[one.name]
            always = one.name in (*runs.ALWAYS, "output_dir")
            hidden = value is None or (isinstance(part, TrainingArguments) and source == DEFAULT and not always)
            if not hidden and one.init and source != PLANNED and one.name != "plan":
                lines.append((one.name, "***" if is_secret(one.name) else _as_text(value), source))
        return lines


@dataclass(frozen=True)
class Script:
    """A script that makes one run.

    Attributes:
        name: of its file, for messages.
        kinds: the dataclasses of its flags.
        defaults: values that differ from those of the dataclasses.
        row: the values of a row by its name.
        place: the output folder of a run with these values, unless --output_dir gives it.
        adjust: changes values that follow from others. It is given all values and the names of those that somebody
            chose, and returns the changes, each with its reason.
        description: what --help says first.
        renamed: today's names of flags by their former ones, which are still understood.
        check: raises ValueError for settings that would fail, or do nothing, later; nothing has been loaded yet.
    """

    name: str
    kinds: tuple[type, ...]
    defaults: Mapping[str, Any]
    row: Callable[[str], Mapping[str, Any]]
    place: Callable[[argparse.Namespace], Path]
    adjust: Callable[[argparse.Namespace, set[str]], dict[str, tuple[Any, str]]] = lambda values, chosen: {}
    description: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Settings], None] = lambda settings: None

    def start(self, arguments: list[str], run: Callable[[Settings], Any]) -> Any:
        """What `run` gives for a command line, once its settings are shown; with --plan they are shown alone."""
        settings = self.read(arguments)
        return {} if settings.show() else run(settings)

    def read(self, arguments: list[str]) -> Settings:
        """The settings of a command line.

        Raises:
            ValueError: an unknown or wrong flag, row, or file; or as the dataclasses and `check`.
        """
        return self._resolved([self._todays(part) for part in split(arguments)], {})

    def of(self, values: Mapping[str, Any]) -> Settings:
        """The settings of these values by the flags' names, for a caller in Python; None is a flag not given.

        Raises:
            ValueError: as `read`.
        """
        told = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        return self._resolved([], {name: value for name, value in told.items() if value is not None})

    def _resolved(self, arguments: list[str], told: Mapping[str, Any]) -> Settings:
        """The settings of a command line, or of what a caller told."""
        given = self._given(arguments)
        parser = self._parser()
        told = self._checked(told, parser, CALLER)
        file = given.get("config", told.get("config"))
        config = self._checked(self._read(Path(file)), parser, file) if file is not None else {}
        name = given.get("row", told.get("row", config.get("row")))
        row = {} if name is None else self._checked(self.row(name), parser, f"row {name}")
        if {**config, **told, **given}.get("recipe") and not row.get("recipe"):
            # A row of other settings keeps its model, data and training: the recipe is asked for in place of the rest.
            row = {flag: value for flag, value in row.items() if flag not in OF_RECIPE}
        layers = [(self.defaults, f"default of {self.name}"), (row, f"row {name}"), (config, f"config {file}")]
        layers.append((told, CALLER))
        sources = {name: source for values, source in layers for name in values}
        values = {**self.defaults, **row, **config, **told}
        parser.set_defaults(**values)
        for action in parser._actions:  # a default does away with the need to give a flag
            action.required = action.required and action.dest not in values
        namespace = parser.parse_args(arguments)
        sources |= dict.fromkeys(given, FLAG)
        chosen = {*row, *config, *told, *given}
        changes = self.adjust(namespace, chosen)
        if namespace.recipe and "warmup_steps" not in chosen:
            changes["warmup_steps"] = (WARMUP, "recipe")
        if sources.get("disable_tqdm") is None:
            changes["disable_tqdm"] = (bars.are_hidden(), DEFAULT)
        if namespace.plan:  # of what may run elsewhere
            changes["use_cpu"] = (True, PLANNED)
        elif namespace.bf16 and sources.get("use_cpu") is None and not _has_accelerator():
            changes["use_cpu"] = (True, "bf16 without an accelerator: autocast on the processor")
        if namespace.output_dir is None:
            changes["output_dir"] = (str(self.place(namespace)), DEFAULT)
        for name, (value, reason) in changes.items():
            setattr(namespace, name, value)
            sources[name] = reason
        known = vars(namespace)
        parts = tuple(kind(**{f.name: known[f.name] for f in fields(kind) if f.init}) for kind in self._all_kinds())
        texts = {name: _as_text(value) for name, value in {**config, **told}.items() if value is not None}
        overrides = runs.real_flags(texts) | runs.overrides(arguments)
        known_sources = {name: sources.get(name, DEFAULT) for name in self._names()}
        settings = Settings(self.name, parts, known_sources, overrides)
        settings.of(MethodArguments).settings("all-linear", None)  # a flag that does nothing is refused at once
        self.check(settings)
        return settings

    def _read(self, path: Path) -> dict[str, Any]:
        """The values in a configuration file, under the names of today."""
        values = read_config(path, [*self._names(), *self.renamed])
        return {self.renamed.get(name, name): value for name, value in values.items()}

    def _todays(self, part: str) -> str:
        """A flag under its name of today, and anything else as it is."""
        name = part.removeprefix("--")
        return f"--{self.renamed.get(name, name)}" if part.startswith("--") else part

    def _all_kinds(self) -> tuple[Any, ...]:
        return (StartArguments, *self.kinds)

    def _names(self) -> list[str]:
        return [f.name for kind in self._all_kinds() for f in fields(kind) if f.init]

    def _parser(self, **options: Any) -> HfArgumentParser:
        kinds: Any = self._all_kinds()
        made = HfArgumentParser(kinds, prog=self.name, description=self.description, formatter_class=_Help, **options)
        return commands.one_line_errors(made)

    def _given(self, arguments: list[str]) -> dict[str, Any]:
        """The flags of the command line alone."""
        parser = self._parser(add_help=False)
        for action in parser._actions:
            action.default, action.required = argparse.SUPPRESS, False
        return vars(parser.parse_known_args(arguments)[0])

    def _checked(self, values: Mapping[str, Any], parser: HfArgumentParser, where: str) -> dict[str, Any]:
        """The values as the flags' types have them."""
        hints = {name: hint for kind in self._all_kinds() for name, hint in typing.get_type_hints(kind).items()}
        actions = {action.dest: action for action in reversed(parser._actions)}
        if unknown := next((name for name in values if name not in actions), None):
            raise ValueError(f"{where}: {self.name} has no flag --{unknown}")
        return {name: _typed(value, name, hints[name], actions[name], where) for name, value in values.items()}


def _has_accelerator() -> bool:
    """Whether this machine trains on anything but its processor."""
    return bool(getattr(torch, "accelerator", torch.cuda).is_available())  # PyTorch has the former from 2.6 on


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and each flag with its default."""


# ------------------------------------------------------------------------------------- values


def _typed(value: Any, name: str, hint: Any, action: argparse.Action, where: str) -> Any:
    """A value as its flag has it: a text is read as on a command line (YAML takes 1e-3 for one)."""
    kinds = _kinds(hint)
    if isinstance(value, dict) and dict not in kinds and name == "method_settings":
        return json.dumps(value)
    if isinstance(value, str) and str not in (action.type, None) and callable(action.type):
        try:
            value = action.type(value)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            raise _wrong(value, name, kinds, where, action.choices) from None
    elif type(value) is int and int not in kinds and float in kinds:
        value = float(value)
    elif value is not None and type(value) not in kinds:
        raise _wrong(value, name, kinds, where)
    if value is None and type(None) not in kinds:
        raise _wrong(value, name, kinds, where)
    if action.choices is not None and value is not None and value not in action.choices:
        raise _wrong(value, name, kinds, where, action.choices)
    return value


def _wrong(value: Any, name: str, kinds: set[type], where: str, choices: Iterable[Any] | None = None) -> ValueError:
    wanted = " or ".join(words for kind, words in KINDS.items() if kind in kinds)
    wanted = wanted if choices is None else f"one of {', '.join(map(str, choices))}"
    return ValueError(f"{where}: {name} is {wanted}, not {'***' if is_secret(name) else repr(value)}")


def _kinds(hint: Any) -> set[type]:
    """The plain types that a field may have."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return set().union(*(_kinds(one) for one in typing.get_args(hint)))
    if typing.get_origin(hint) is Literal:
        return {type(one) for one in typing.get_args(hint)}
    found = typing.get_origin(hint) or hint
    return {str} if isinstance(found, type) and issubclass(found, (Enum, Path)) else {found}


def _as_text(value: Any) -> str:
    """A value as it stands on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return str(getattr(value, "value", value))
