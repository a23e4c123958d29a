"""`vblora count`: the stored parameters of the paper's Tables 1 to 4, recomputed beside the printed ones.

For a size of Whisper, which the paper has not, it prints what each method stores for its sets of layers.

The `vblora` command finds this by its entry point (group vblora.commands), because the library knows no paper.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from vblora_experiments import whisper_counts
from vblora_experiments.paper_counts import (
    METHOD_NAMES,
    MODELS,
    RULES,
    TABLE_TITLES,
    Comparison,
    compare,
    select_rows,
)

WIDTH = 130
WHISPER = "whisper"  # all sizes
SETTINGS = {
    "rank": "rank r",
    "num_vectors": "h, the vectors in VB-LoRA's bank",
    "vector_length": "b, the length of a sub-vector",
    "topk": "k, the vectors mixed into a sub-vector",
}


def add_to(commands: Any) -> None:
    """Add the command to those of argparse's sub-parsers."""
    count = commands.add_parser(
        "count",
        help="stored parameters of the paper's Tables 1 to 4, recomputed",
        description="The stored parameters of every row of the paper's Tables 1 to 4, computed from the "
        "layer shapes, beside the printed figure and the rule that reproduces it. For a size of Whisper (--model "
        "whisper-large-v2, or whisper for all of them): what each method stores, by the layers it adapts.",
    )
    count.add_argument("--table", type=_table, metavar="N", help=_one_of(TABLE_TITLES))
    count.add_argument("--model", type=_model, metavar="NAME", help=_one_of(_models()))
    count.add_argument("--method", type=_method, metavar="NAME", help=_one_of(METHOD_NAMES.values()))
    for_whisper = count.add_argument_group("for Whisper")
    for_whisper.add_argument("--targets", type=_targets, metavar="NAME", help=_one_of(whisper_counts.TARGETS))
    for name, what in SETTINGS.items():
        for_whisper.add_argument(f"--{name}", type=int, metavar="N", help=what)
    count.add_argument("--json", action="store_true", help="print JSON, with the notes and the true bytes")
    count.set_defaults(run=_count)


def _one_of(names: Any) -> str:
    return "one of " + ", ".join(map(str, names))


def _table(text: str) -> int:
    return _known("table", text, {str(table): table for table in TABLE_TITLES})


def _model(text: str) -> str:
    return _known("model", text.removeprefix("openai/"), {name: name for name in _models()})


def _models() -> list[str]:
    return [*MODELS, WHISPER, *whisper_counts.SIZES]


def _targets(text: str) -> str:
    return _known("targets", text, {name: name for name in whisper_counts.TARGETS})


def _method(text: str) -> str:
    # Both "VB-LoRA", as the tables print it, and "vblora", as the code calls it.
    return _known("method", text, {name: key for key, name in METHOD_NAMES.items()})


def _known(what: str, text: str, choices: dict[str, Any]) -> Any:
    """The value of `choices` that `text` names, whatever its case, hyphens and underscores."""

    def plain(name: str) -> str:
        return name.lower().replace("-", "").replace("_", "")

    for name, value in choices.items():
        if plain(name) == plain(text):
            return value
    raise argparse.ArgumentTypeError(f"unknown {what} {text!r}: known are {', '.join(choices)}")


def _count(arguments: argparse.Namespace) -> str:
    chosen = {name: value for name in SETTINGS if (value := getattr(arguments, name)) is not None}
    if arguments.table is None and arguments.model in (WHISPER, *whisper_counts.SIZES):
        return _of_whisper(arguments, {{"rank": "r"}.get(name, name): value for name, value in chosen.items()})
    if flags := [*(["targets"] if arguments.targets else []), *chosen]:
        raise ValueError(f"--{flags[0]} is for Whisper alone: --model whisper, or one of its sizes, and no --table")
    rows = select_rows(arguments.table, arguments.model, arguments.method)
    if not rows:
        wanted = {
            "table": arguments.table,
            "model": arguments.model,
            "method": METHOD_NAMES.get(arguments.method),
        }
        asked = ", ".join(f"{name} {value}" for name, value in wanted.items() if value is not None)
        raise ValueError(f"the paper has no row for {asked}")
    comparisons = [compare(row) for row in rows]
    if arguments.json:
        return json.dumps([_as_json(comparison) for comparison in comparisons], indent=2)
    return _as_text(comparisons)


def _of_whisper(arguments: argparse.Namespace, chosen: dict[str, int]) -> str:
    models = list(whisper_counts.SIZES) if arguments.model == WHISPER else [arguments.model]
    targets = [arguments.targets] if arguments.targets else list(whisper_counts.TARGETS)
    methods = [arguments.method] if arguments.method else ["full", *whisper_counts.SETTINGS]
    found = whisper_counts.stored(models, targets, methods, chosen)
    if arguments.json:
        return json.dumps([whisper_counts.as_json(one) for one in found], indent=2)
    headings = ("model", "method", "targets", "settings", "stored numbers", "file")
    cells = [
        (
            one.model,
            METHOD_NAMES[one.method],
            one.targets,
            _settings(one.settings),
            f"{one.counts.parameters:,}",
            _size(one.counts.bytes),
        )
        for one in found
    ]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    return "\n".join([WHISPER_LEGEND, "", *(_line(headings, row, widths) for row in (headings, *cells))])


def _as_json(comparison: Comparison) -> dict[str, Any]:
    row, counts, reproduced_by = comparison
    return {
        **row._asdict(),
        "counts": counts._asdict(),
        "reproduced_by": reproduced_by,
        "verdict": comparison.verdict,
    }


HEADINGS = ("method", "targets", "settings", "printed", *RULES.values(), "file", "reproduced by")
RIGHT_ALIGNED = {"printed", "file", "stored numbers", *RULES.values()}

LEGEND = """\
Stored parameters in float32 equivalents, by three rules for an index into VB-LoRA's bank:
  byte   one byte an index, however large the bank (the paper's rule)
  sized  as many bytes an index as the bank needs
  float  four bytes an index, like a weight (the authors' code)
The other methods store no index, and have one count. "file" is the tensors' true size (exact with --json), for
VB-LoRA in PEFT's top-k form. "reproduced by" is the rule that gives the printed figure, rounded or truncated to its
digits (both: either way); r rank, h bank size, b vector length."""


WHISPER_LEGEND = """\
Stored numbers in float32 equivalents, an index into VB-LoRA's bank as one byte; "file" is the tensors' true size
(exact with --json), for VB-LoRA in PEFT's top-k form, for VeRA without the random matrices that can be drawn again.
Full fine-tuning is of the whole model; r rank, h bank size, b vector length, k vectors to a sub-vector."""


def _as_text(comparisons: Sequence[Comparison]) -> str:
    cells = [_cells(comparison) for comparison in comparisons]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *cells, strict=True)]
    lines = []
    numbered = zip(comparisons, cells, strict=True)
    for (table, model), group in groupby(numbered, key=lambda pair: (pair[0].row.table, pair[0].row.model)):
        lines += ["", f"Table {table}, {TABLE_TITLES[table]}: {model}", _line(HEADINGS, HEADINGS, widths)]
        for comparison, row_cells in group:
            lines.append(_line(HEADINGS, row_cells, widths))
            lines += textwrap.wrap(comparison.row.note, WIDTH, initial_indent="  note: ", subsequent_indent="        ")
    return "\n".join([LEGEND, *lines])


def _cells(comparison: Comparison) -> tuple[str, ...]:
    row, stored, _ = comparison
    counts = [f"{getattr(stored, rule):,}" for rule in RULES]
    if row.method != "vblora":
        counts[1:] = [""] * (len(counts) - 1)
    return (
        METHOD_NAMES[row.method],
        row.targets,
        _settings({name: value for name, value in row.settings.items() if name != "topk"}),
        row.printed,
        *counts,
        _size(stored.bytes),
        comparison.verdict,
    )


def _settings(settings: Mapping[str, int]) -> str:
    short = {"r": "r", "num_vectors": "h", "vector_length": "b", "topk": "k"}
    return " ".join(f"{letter} {settings[name]}" for name, letter in short.items() if name in settings)


def _size(size: int) -> str:
    """Bytes to three digits, in powers of 1000."""
    value, units = float(size), ["B", "kB", "MB", "GB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def _line(headings: Sequence[str], cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [
        cell.rjust(width) if heading in RIGHT_ALIGNED else cell.ljust(width)
        for heading, cell, width in zip(headings, cells, widths, strict=True)
    ]
    return "  ".join(aligned).rstrip()
