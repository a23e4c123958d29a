"""The `vblora` command.

    vblora inspect    what a saved adapter holds
    vblora pack       an adapter's directory as one small file
    vblora unpack     such a file as a directory
    vblora merge      a whole model with the adapter in its weights
    vblora export     an adapter as plain LoRA, for PEFT, vLLM and SGLang
    vblora serve      a classifier with a folder of packed adapters, over HTTP

Other packages add commands by an entry point of the group vblora.commands: a checkout of the repository adds
`vblora count`, the paper's counts. A mistake in what was asked for is one line on stderr, `vblora: error: ...`, and
exit code 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vblora import __version__

if TYPE_CHECKING:
    from vblora.files.content import Content


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        print(arguments.run(arguments), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:  # models need transformers and, for some adapters, peft
        if error.name is None or error.name.startswith("vblora"):
            raise
        package = error.name.partition(".")[0]
        return _refuse(f"this command needs {package}: pip install {package}")
    return 0


def _refuse(message: str) -> int:
    print("vblora: error:", " ".join(message.split()), file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage above the message; `main` reports every mistake in one line.
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vblora", description="VB-LoRA: inspect, pack, merge, export and serve adapters.")
    parser.add_argument("--version", action="version", version=f"vblora {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)

    inspect = commands.add_parser("inspect", help="what a saved adapter holds")
    inspect.add_argument(
        "directory", metavar="DIR", help="the directory the adapter was saved in, a packed file, or a name on the hub"
    )
    inspect.add_argument("--revision", help="a branch, tag or commit on the hub")
    inspect.add_argument("--subfolder", help="where in the directory or repository the adapter is")
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
    _add_serve(commands)
    _add_from_other_packages(commands)
    commands.metavar = f"{{{','.join(commands.choices)}}}"
    return parser


def _add_from_other_packages(commands: Any) -> None:
    for point in metadata.entry_points(group="vblora.commands"):
        try:
            add_to = point.load()
        except ModuleNotFoundError:  # an installed library without the repository's experiments
            _add_missing(commands, point.name)
        else:
            add_to(commands)


def _add_missing(commands: Any, name: str) -> None:
    def refuse(arguments: argparse.Namespace) -> str:
        raise ValueError(f"vblora {name} comes with the repository: clone it and run pip install -e . there")

    # Whatever follows is taken as it is, flags too: the command's own parser is not here.
    missing = commands.add_parser(name, help="comes with the repository", prefix_chars="\0", add_help=False)
    missing.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    missing.set_defaults(run=refuse)


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
        choices=(*types, "int4", "shared"),
        default="lossless",
        help="type of the vector bank; shared: in a file of its own beside FILE, for all adapters with the same bank",
    )
    pack.add_argument("--weights", choices=("lossless", "16", "8"), default="lossless", help="bits of a weight")
    pack.add_argument(
        "--selection",
        choices=("indices", "seed"),
        default="indices",
        help="seed: leave out a selection that never moved, which the adapter's seed draws again",
    )
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
        help="an adapter as plain LoRA, for PEFT, vLLM, SGLang and llama.cpp",
        description="Write an adapter as a directory of plain LoRA with the very same outputs, or as one GGUF file for "
        "llama.cpp and Ollama. A packed file needs nothing else for a directory, unless it is LoRA-XS; other adapters, "
        "and GGUF, need their model.",
    )
    export.add_argument("model", metavar="RUN_OR_MODEL", help="a training's output folder, a model, or a packed file")
    export.add_argument("output", metavar="OUTPUT", help="the folder to write, which must not exist; or the .gguf file")
    export.add_argument("--adapter", metavar="DIR", help="the adapter, where the first argument is a model")
    export.add_argument("--model_name_or_path", metavar="MODEL", help="a run's base model; as in training unless given")
    export.add_argument("--to", choices=("lora", "gguf"), default="lora", help="the format")
    types = ("float32", "float16", "bfloat16")
    export.add_argument("--dtype", choices=types, default="float32", help="of the factors in the file")
    export.set_defaults(run=_export)


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="a classifier with a folder of packed adapters, over HTTP",
        description="Serve a model for sequence classification with every packed adapter of a folder, each text by its "
        "own adapter, over HTTP (docs/serving.md). Adapters that come, go or are replaced are followed.",
    )
    serve.add_argument("model", metavar="MODEL", help="the base model's folder or name")
    serve.add_argument("adapters", metavar="ADAPTERS", help="the folder of NAME.vblora.safetensors")
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="0 is any that is free (%(default)s)")
    serve.add_argument(
        "--keep", default="1GB", help="adapters kept ready in memory: a number of them, or bytes (%(default)s)"
    )
    serve.add_argument("--max_tokens", type=int, help="of a text; as many as the model has positions unless given")
    serve.add_argument("--max_texts", type=int, default=64, help="of a request (%(default)s)")
    serve.add_argument("--max_body", type=int, default=2**18, help="bytes of a request (%(default)s)")
    serve.add_argument("--queue", type=int, default=1024, help="texts that may wait (%(default)s)")
    serve.add_argument("--batch_rows", type=int, default=32, help="texts of a batch (%(default)s)")
    serve.add_argument("--batch_tokens", type=int, default=4096, help="of a batch, with padding (%(default)s)")
    types = ("float32", "float16", "bfloat16")
    serve.add_argument("--dtype", choices=types, default="float32", help="of the model's weights (%(default)s)")
    serve.set_defaults(run=_serve)


# --- inspect ----------------------------------------------------------------------------------------


def _inspect(arguments: argparse.Namespace) -> str:
    # Imported here because it needs torch, which `count` does without.
    from vblora.files.describe import describe, render
    from vblora.files.remote import local_path

    description = describe(local_path(arguments.directory, arguments.revision, arguments.subfolder))
    return json.dumps(description, indent=2) if arguments.json else render(description)


# --- pack -------------------------------------------------------------------------------------------


def _pack(arguments: argparse.Namespace) -> str:
    from vblora.files import convert, packed
    from vblora.files.directory import TENSOR_FILE

    weights = arguments.weights if arguments.weights == "lossless" else int(arguments.weights)
    source, file = Path(arguments.directory), Path(arguments.file)
    before = source if source.is_file() else source / TENSOR_FILE
    content = _read_adapter(source, arguments.model)
    size = before.stat().st_size
    chosen = {"bank": arguments.bank, "heads": arguments.heads, "selection": arguments.selection}
    packed.write(content, file, weights=weights, **chosen)
    loss, now = convert.compare(content, packed.read(file)), file.stat().st_size
    lines = [f"{before}: {size:,} bytes", f"{file}: {now:,} bytes, {now / size:.1%}"]
    if loss is not None:
        lines.append(
            f"largest error of a factor's entry {loss.largest_error:.3g}, of entries up to {loss.largest_entry:.3g}"
        )
    return "\n".join(lines)


def _read_adapter(source: Path, model: str | None) -> Content:
    from vblora.files import convert

    if model is None:
        return convert.read_directory(source)
    from vblora.models import read_adapter

    return read_adapter(source, model)


def _unpack(arguments: argparse.Namespace) -> str:
    from vblora.files import convert

    content = convert.unpack(arguments.file, arguments.directory, format=arguments.format)
    return f"{arguments.directory}: {content.config.method} for {len(content.shapes)} layers"


# --- merge ------------------------------------------------------------------------------------------


def _merge(arguments: argparse.Namespace) -> str:
    from vblora.models import Tuned, write_merged

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
    import torch

    source, output, dtype = Path(arguments.model), Path(arguments.output), getattr(torch, arguments.dtype)
    if source.is_file():
        return _export_packed(source, output, dtype, arguments)
    from vblora.models import Tuned, write_exported

    adapter = Path(arguments.adapter) if arguments.adapter else None
    tuned = Tuned.of(arguments.model, adapter=adapter, base=arguments.model_name_or_path)
    return str(write_exported(tuned, output, dtype, arguments.to))


def _export_packed(source: Any, output: Any, dtype: Any, arguments: argparse.Namespace) -> str:
    from vblora.files import lora, packed

    if arguments.adapter or arguments.model_name_or_path:
        raise ValueError(f"{source} is the adapter, with all it needs: leave --adapter and --model_name_or_path out")
    content = packed.read(source)
    needs = {"lora_xs": "LoRA-XS needs its model's weights"}.get(content.config.method)
    if arguments.to == "gguf":
        needs = "a GGUF file needs its model's configuration"
    if needs:
        raise ValueError(f"{needs}: vblora export MODEL {output} --adapter {source} --to {arguments.to}")
    lora.export(content, output, dtype=dtype)
    return str(output)


# --- serve ------------------------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace) -> str:
    needed = ("fastapi", "uvicorn", "prometheus_client", "transformers")
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ValueError(f"vblora serve needs {', '.join(absent)}: pip install {' '.join(absent)}")
    import torch

    from vblora.serving.classifier import Classifier
    from vblora.serving.expanded import Limit
    from vblora.serving.server import Limits, serve

    try:
        keep = Limit.of(arguments.keep)
    except ValueError as error:
        raise ValueError(f"--keep: {error}") from error
    limits = Limits(
        texts=arguments.max_texts,
        body=arguments.max_body,
        waiting=arguments.queue,
        rows=arguments.batch_rows,
        tokens=arguments.batch_tokens,
    )

    def load() -> Classifier:
        return Classifier.load(
            arguments.model,
            arguments.adapters,
            max_tokens=arguments.max_tokens,
            max_composed=sys.maxsize if keep.adapters is None else keep.adapters,
            max_bytes=keep.bytes,
            dtype=getattr(torch, arguments.dtype),
        )

    return serve(load, arguments.host, arguments.port, limits)


if __name__ == "__main__":
    raise SystemExit(main())
