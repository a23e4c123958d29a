"""The `vblora` command.

    vblora count      the stored parameters of the paper's Tables 1 to 4, recomputed beside the printed ones
    vblora inspect    what a saved adapter holds
    vblora pack       an adapter's directory as one small file
    vblora unpack     such a file as a directory
    vblora merge      a whole model with the adapter in its weights
    vblora export     an adapter as plain LoRA, for PEFT, vLLM and SGLang

A mistake in what was asked for is one line on stderr, `vblora: error: ...`, and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NoReturn

from vblora.paper_counts import (
    METHOD_NAMES,
    MODELS,
    RULES,
    TABLE_TITLES,
    Comparison,
    compare,
    select_rows,
)

WIDTH = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        print(arguments.run(arguments), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print("vblora: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage above the message; `main` reports every mistake in one line.
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vblora", description="VB-LoRA: count stored parameters, inspect, pack and merge adapters.")
    commands = parser.add_subparsers(
        title="commands", metavar="{count,inspect,pack,unpack,merge,export}", required=True
    )

    count = commands.add_parser(
        "count",
        help="stored parameters of the paper's Tables 1 to 4, recomputed",
        description="The stored parameters of every row of the paper's Tables 1 to 4, computed from the "
        "layer shapes, beside the printed figure and the rule that reproduces it.",
    )
    count.add_argument("--table", type=_table, metavar="N", help=_one_of(TABLE_TITLES))
    count.add_argument("--model", type=_model, metavar="NAME", help=_one_of(MODELS))
    count.add_argument("--method", type=_method, metavar="NAME", help=_one_of(METHOD_NAMES.values()))
    count.add_argument("--json", action="store_true", help="print JSON, with the notes and the true bytes")
    count.set_defaults(run=_count)

    inspect = commands.add_parser("inspect", help="what a saved adapter holds")
    inspect.add_argument("directory", metavar="DIR", help="the directory the adapter was saved in, or a packed file")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    _add_pack(commands)

    merge = commands.add_parser(
        "merge",
        help="a whole model with the adapter in its weights",
        description="Write a causal language model with an adapter in its weights, in sharded safetensors. An adapter "
        "that was trained on quantised weights is added to what those stand for.",
    )
    merge.add_argument("model", metavar="RUN_OR_MODEL", help="a training's output folder, or a model")
    merge.add_argument("output", metavar="OUTPUT", help="the folder to write; it must not exist")
    merge.add_argument("--adapter", metavar="DIR", help="the adapter, where the first argument is a model")
    merge.add_argument("--model_name_or_path", metavar="MODEL", help="a run's base model; as in training unless given")
    merge.add_argument("--dtype", help="of the weights: the run's, or as they are kept")
    merge.add_argument("--bits", type=int, choices=(4, 8, 16), help="that the adapter was trained on; the run's, or 16")
    merge.add_argument(
        "--original_weights", action="store_true", help="add to the weights as published, not as they were quantised"
    )
    merge.set_defaults(run=_merge)

    _add_export(commands)
    return parser


def _add_pack(commands: Any) -> None:
    pack = commands.add_parser(
        "pack",
        help="an adapter's directory as one small file",
        description="Write the adapter in a directory as one packed file (docs/packed_format.md), and print what that "
        "saves and loses. Without settings nothing is lost.",
    )
    pack.add_argument("directory", metavar="DIR", help="the adapter's directory, or a packed file")
    pack.add_argument("file", metavar="FILE", help="the file to write, by convention NAME.vblora.safetensors")
    types = ("lossless", "float32", "float16", "bfloat16", "int8")
    pack.add_argument(
        "--bank",
        choices=(*types, "shared"),
        default="lossless",
        help="type of the vector bank; shared: in a file of its own beside FILE, for all adapters with the same bank",
    )
    pack.add_argument("--weights", choices=("lossless", "16", "8"), default="lossless", help="bits of a weight")
    pack.add_argument("--heads", choices=types, default="lossless", help="type of modules_to_save")
    pack.add_argument("--model", metavar="MODEL", help="the base model's folder or name, where DIR names no layers")
    pack.set_defaults(run=_pack)

    unpack = commands.add_parser("unpack", help="a packed file as a directory")
    unpack.add_argument("file", metavar="FILE", help="the packed file")
    unpack.add_argument("directory", metavar="DIR", help="the directory to write; PEFT's format where that can hold it")
    unpack.add_argument("--format", choices=("auto", "peft", "native"), default="auto", help="the directory's format")
    unpack.set_defaults(run=_unpack)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="an adapter as plain LoRA, for PEFT, vLLM and SGLang",
        description="Write an adapter as a directory of plain LoRA with the very same outputs. A packed file needs "
        "nothing else, unless it is LoRA-XS; other adapters need their model.",
    )
    export.add_argument("model", metavar="RUN_OR_MODEL", help="a training's output folder, a model, or a packed file")
    export.add_argument("output", metavar="OUTPUT", help="the folder to write; it must not exist")
    export.add_argument("--adapter", metavar="DIR", help="the adapter, where the first argument is a model")
    export.add_argument("--model_name_or_path", metavar="MODEL", help="a run's base model; as in training unless given")
    export.add_argument("--to", choices=("lora",), default="lora", help="the format")
    types = ("float32", "float16", "bfloat16")
    export.add_argument("--dtype", choices=types, default="float32", help="of the factors in the file")
    export.set_defaults(run=_export)


def _one_of(names: Any) -> str:
    return "one of " + ", ".join(map(str, names))


def _table(text: str) -> int:
    return _known("table", text, {str(table): table for table in TABLE_TITLES})


def _model(text: str) -> str:
    return _known("model", text, {name: name for name in MODELS})


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


# --- count ------------------------------------------------------------------------------------------


def _count(arguments: argparse.Namespace) -> str:
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


def _as_json(comparison: Comparison) -> dict[str, Any]:
    row, counts, reproduced_by = comparison
    return {
        **row._asdict(),
        "counts": counts._asdict(),
        "reproduced_by": reproduced_by,
        "verdict": comparison.verdict,
    }


HEADINGS = ("method", "targets", "settings", "printed", *RULES.values(), "file", "reproduced by")
RIGHT_ALIGNED = {"printed", "file", *RULES.values()}

LEGEND = """\
Stored parameters in float32 equivalents, by three rules for an index into VB-LoRA's bank:
  byte   one byte an index, however large the bank (the paper's rule)
  sized  as many bytes an index as the bank needs
  float  four bytes an index, like a weight (the authors' code)
The other methods store no index, and have one count. "file" is the tensors' true size (exact with --json), for
VB-LoRA in PEFT's top-k form. "reproduced by" is the rule that gives the printed figure, rounded or truncated to its
digits (both: either way); r rank, h bank size, b vector length."""


def _as_text(comparisons: Sequence[Comparison]) -> str:
    cells = [_cells(comparison) for comparison in comparisons]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *cells, strict=True)]
    lines = []
    numbered = zip(comparisons, cells, strict=True)
    for (table, model), group in groupby(numbered, key=lambda pair: (pair[0].row.table, pair[0].row.model)):
        lines += ["", f"Table {table}, {TABLE_TITLES[table]}: {model}", _line(HEADINGS, widths)]
        for comparison, row_cells in group:
            lines.append(_line(row_cells, widths))
            lines += textwrap.wrap(comparison.row.note, WIDTH, initial_indent="  note: ", subsequent_indent="        ")
    return "\n".join([LEGEND, *lines])


def _cells(comparison: Comparison) -> tuple[str, ...]:
    row, stored, _ = comparison
    counts = [f"{getattr(stored, rule):,}" for rule in RULES]
    if row.method != "vblora":
        counts[1:] = [""] * (len(counts) - 1)
    short = {"r": "r", "num_vectors": "h", "vector_length": "b"}
    settings = " ".join(f"{letter} {row.settings[name]}" for name, letter in short.items() if name in row.settings)
    return (
        METHOD_NAMES[row.method],
        row.targets,
        settings,
        row.printed,
        *counts,
        _size(stored.bytes),
        comparison.verdict,
    )


def _size(size: int) -> str:
    """Bytes to three digits, in powers of 1000."""
    value, units = float(size), ["B", "kB", "MB", "GB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [
        cell.rjust(width) if heading in RIGHT_ALIGNED else cell.ljust(width)
        for heading, cell, width in zip(HEADINGS, cells, widths, strict=True)
    ]
    return "  ".join(aligned).rstrip()


# --- inspect ----------------------------------------------------------------------------------------


def _inspect(arguments: argparse.Namespace) -> str:
    # Imported here because it needs torch, which `count` does without.
    from vblora.storage.inspect import describe, render

    description = describe(arguments.directory)
    return json.dumps(description, indent=2) if arguments.json else render(description)


# --- pack -------------------------------------------------------------------------------------------


def _pack(arguments: argparse.Namespace) -> str:
    from pathlib import Path

    from vblora.storage import TENSOR_FILE, packed, packing

    weights = arguments.weights if arguments.weights == "lossless" else int(arguments.weights)
    source, file = Path(arguments.directory), Path(arguments.file)
    before = source if source.is_file() else source / TENSOR_FILE
    content = packing.read_directory(source, arguments.model)
    size = before.stat().st_size
    packed.write(content, file, bank=arguments.bank, weights=weights, heads=arguments.heads)
    loss, now = packing.compare(content, packed.read(file)), file.stat().st_size
    lines = [f"{before}: {size:,} bytes", f"{file}: {now:,} bytes, {now / size:.1%}"]
    if loss is not None:
        lines.append(
            f"largest error of a factor's entry {loss.largest_error:.3g}, of entries up to {loss.largest_entry:.3g}"
        )
    return "\n".join(lines)


def _unpack(arguments: argparse.Namespace) -> str:
    from vblora.storage import packing

    content = packing.unpack(arguments.file, arguments.directory, format=arguments.format)
    return f"{arguments.directory}: {content.config.method} for {len(content.shapes)} layers"


# --- merge ------------------------------------------------------------------------------------------


def _merge(arguments: argparse.Namespace) -> str:
    from pathlib import Path

    try:
        from vblora.training.merging import write_merged
        from vblora.training.tuned import Tuned
    except ModuleNotFoundError as error:
        raise ValueError(f"merge needs transformers: pip install 'vblora[train]' ({error})") from error
    tuned = Tuned.of(
        arguments.model,
        adapter=Path(arguments.adapter) if arguments.adapter else None,
        base=arguments.model_name_or_path,
        bits=arguments.bits,
        dtype=arguments.dtype,
    )
    return str(write_merged(tuned, Path(arguments.output), arguments.original_weights))


# --- export -----------------------------------------------------------------------------------------


def _export(arguments: argparse.Namespace) -> str:
    from pathlib import Path

    import torch

    source, output, dtype = Path(arguments.model), Path(arguments.output), getattr(torch, arguments.dtype)
    if source.is_file():
        return _export_packed(source, output, dtype, arguments)
    try:
        from vblora.training.exporting import write_exported
        from vblora.training.tuned import Tuned
    except ModuleNotFoundError as error:
        raise ValueError(f"export needs transformers: pip install 'vblora[train]' ({error})") from error
    adapter = Path(arguments.adapter) if arguments.adapter else None
    tuned = Tuned.of(arguments.model, adapter=adapter, base=arguments.model_name_or_path)
    return str(write_exported(tuned, output, dtype))


def _export_packed(source: Any, output: Any, dtype: Any, arguments: argparse.Namespace) -> str:
    from vblora.storage import lora_format, packed

    if arguments.adapter or arguments.model_name_or_path:
        raise ValueError(f"{source} is the adapter, with all it needs: leave --adapter and --model_name_or_path out")
    content = packed.read(source)
    if content.config.method == "lora_xs":
        raise ValueError(f"LoRA-XS needs its model's weights: vblora export MODEL {output} --adapter {source}")
    lora_format.export(content, output, dtype=dtype)
    return str(output)


if __name__ == "__main__":
    raise SystemExit(main())
