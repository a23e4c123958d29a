"""Damaged and hostile files, by the thousand: each must be refused by a ValueError, or be what it was.

    python benchmarks/fuzz.py --cases 10000 [--seed 0] [--record results/fuzz.json]

Sound files are changed as damage.py does; a part of the changes is forged, with checksums that fit again. Directories
in all formats and packed files go through load, inspect, pack, unpack and AdapterStore; selection logs, progress
files, records and tables through their readers. Anything but a ValueError (or FileNotFoundError), ten seconds, or an
adapter that is another one where nothing was forged, is a failure: it is printed, and the command ends with code 1.
"""

from __future__ import annotations

import argparse
import collections
import io
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from damage import attempt, change
from torch import Tensor, nn

import vblora
from vblora import container
from vblora.files import convert, directory, packed
from vblora.files.content import Content
from vblora.files.describe import describe, render
from vblora.files.reading import read_bank
from vblora.io import read_tensors, write_json
from vblora_experiments import bars, commands, records, selection_log, text_files
from vblora_experiments.progress import Progress
from vblora_experiments.records import environment

sys.path.append(str(Path(__file__).resolve().parents[1] / "NLU"))
glue_table, load_task = import_module("table"), import_module("glue_data").load_task

SECONDS = 10


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer.down(torch.tanh(layer.up(x)))
        return self.head(x)


def base() -> nn.Module:
    torch.manual_seed(0)
    return Model()


class Kind(NamedTuple):
    """Sound files of one kind: what makes them in a folder, and what reads them there.

    Reading gives what it has found for a comparison, or None.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]


# --- Adapters -------------------------------------------------------------------------------------------------------


def adapter_of(config: Any) -> vblora.Adapter:
    adapter = vblora.attach(base(), config, seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if isinstance(config, vblora.VBLoRAConfig):
        adapter.reselect()
    return adapter


def bank(**settings: Any) -> vblora.VBLoRAConfig:
    usual = {"r": 2, "num_vectors": 12, "vector_length": 16, "topk": 2, "target_modules": ["up", "down"]}
    return vblora.VBLoRAConfig(**{**usual, **settings})


CONFIGS: dict[str, Callable[[], Any]] = {
    "plain": bank,
    "head": lambda: bank(modules_to_save=["head"], target_modules=r"layers\.\d\.(up|down)"),
    "cut": lambda: bank(vector_length=12, exclude_modules=["layers.0.up"]),
    "some": lambda: bank(layers_to_transform=[1], layers_pattern="layers"),
    "split": lambda: bank(split_modules={"up": ["q", "k"]}),
    "tied": lambda: vblora.TiedLoRAConfig(r=2, target_modules=["up"]),
    "xs": lambda: vblora.LoRAXSConfig(r=2, target_modules=["up", "down"]),
}


def make_directory(name: str, form: str, format: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        adapter_of(CONFIGS[name]()).save(folder / "adapter", form=form, format=format)

    return make


def make_old(name: str) -> Callable[[Path], None]:
    """A directory without settings and checksum in its tensors' file, as PEFT and version 0.1 write it."""

    def make(folder: Path) -> None:
        make_directory(name, "topk", "auto")(folder)
        tensors, _ = read_tensors(folder / "adapter" / directory.TENSOR_FILE)
        raws = {key: container.Raw.of(tensor) for key, tensor in tensors.items()}
        (folder / "adapter" / directory.TENSOR_FILE).write_bytes(container.serialize(raws, {"format": "pt"}))

    return make


def make_packed(name: str, **settings: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        packed.write(adapter_of(CONFIGS[name]()), folder / "adapter.safetensors", **settings)

    return make


def make_drawn(folder: Path) -> None:
    """A packed file without its selection, which the seed draws again."""
    adapter = vblora.attach(base(), bank(topk=1), seed=1)
    packed.write(adapter, folder / "adapter.safetensors", selection="seed")


def read_adapter(folder: Path) -> Any:
    """Every way to read an adapter, `load` as the last; its settings and its numbers."""
    path = folder / "adapter"
    if not path.exists():
        path = folder / "adapter.safetensors"
        store = vblora.AdapterStore(base(), folder)
        attempt(lambda: compute(store))
        attempt(lambda: convert.unpack(path, folder / "unpacked"))
    attempt(lambda: render(describe(path)))
    attempt(lambda: read_bank(path))
    for model in (None, base()):
        content = attempt(lambda model=model: convert.read_directory(path, model))
        if content is not None:
            use(content)
    attempt(lambda: vblora.load(base(), path, trainable=True))
    model = base()
    adapter = vblora.load(model, path)
    model(torch.ones(2, 16))
    heads = {f"head.{name}": p.detach() for m in adapter.saved.values() for name, p in m.named_parameters()}
    return adapter.config, {**adapter.tensors("topk"), **heads}


def use(content: Content) -> None:
    """What was taken must be fit to be packed again, and expanded."""
    again = packed.loads(packed.dumps(content))
    if content.config.method != "lora_xs":
        again.factors(2**26)


def compute(store: vblora.AdapterStore) -> None:
    with store.rows([*store.names(), None]):
        store.model(torch.ones(len(store) + 1, 16))


# --- What experiments read ------------------------------------------------------------------------------------------


def make_log(folder: Path) -> None:
    adapter = adapter_of(bank())
    log = selection_log.SelectionLog(adapter, folder)
    state = argparse.Namespace(global_step=0, epoch=0.0, is_world_process_zero=True)
    log.on_train_begin(None, state, None)
    for epoch in (1, 2):
        log.on_step_end(None, state, None)
        state.epoch = float(epoch)
        log.on_epoch_end(None, state, None)
    log.on_train_end(None, state, None)


def read_log(folder: Path) -> None:
    log = selection_log.read_log(folder / records.SELECTIONS_FILE)
    assert log.indices.shape == log.weights.shape and len(log.epochs) == len(log.indices)
    assert log.footprints.shape == (len(log.epochs) - 1, log.indices.shape[1], log.num_vectors)


SETTINGS = {"model": "m", "seed": 0}


def make_progress(folder: Path) -> None:
    progress = Progress.of(folder / "progress.jsonl", SETTINGS)
    progress.add({0: "a", 1: "b\n", 2: "ö"})


def read_progress(folder: Path) -> None:
    texts = Progress.of(folder / "progress.jsonl", SETTINGS).texts
    assert all(type(number) is int and type(text) is str for number, text in texts.items())


def make_record(folder: Path) -> None:
    stored = {"parameters": 100, "with_index_bytes": 100, "authors_code": 120, "bytes": 400}
    scores = [{"epoch": float(n), "loss": 0.5, "matthews_correlation": 0.1 * n} for n in (1, 2)]
    of_run = {"metric": "matthews_correlation", "last": scores[1], "best": scores[1], "epochs": scores}
    record = {
        "experiment": "glue",
        "task": "cola",
        "method": "vblora",
        "model": "m",
        "seed": 0,
        "settings": {"rank": 4},
    }
    more = {
        "stored_parameters": stored,
        "scores": of_run,
        "data": {"train_rows": 3},
        "train_seconds": 1.0,
        "row": None,
        "overrides": {},
    }
    write_json(folder / "record.json", record | more)


def read_record(folder: Path) -> None:
    with redirect_stdout(io.StringIO()):
        glue_table.main([str(folder)])


def make_glue(folder: Path) -> None:
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("x\t1\t\ta b\nx\t0\t*\tc d\n", encoding="utf-8")


def read_glue(folder: Path) -> None:
    load_task("cola", folder)


def make_table(folder: Path) -> None:
    (folder / "rows.tsv").write_text("sentence\tlabel\na b\t1\nc d\t0\n", encoding="utf-8")
    (folder / "rows.csv").write_text('sentence,label\n"a, b",1\n"c ""d""\n",0\n', encoding="utf-8")
    (folder / "rows.json").write_text(
        '[{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}]', encoding="utf-8"
    )
    (folder / "rows.jsonl").write_text('{"sentence": "a", "label": 1}\n{"sentence": "b"}\n', encoding="utf-8")


def read_table(folder: Path) -> None:
    for name in ("rows.tsv", "rows.csv"):
        rows = attempt(lambda name=name: list(text_files.read_table(folder / name))) or []
        attempt(lambda rows=rows: [text_files.check_header(folder, row) for _, row in rows[:1]])
    attempt(lambda: text_files.read_json_rows(folder / "rows.json", as_lines=False))
    attempt(lambda: text_files.read_json_rows(folder / "rows.jsonl", as_lines=True))


KINDS: dict[str, Kind] = {
    "PEFT's format, top-k": Kind(make_directory("plain", "topk", "peft"), read_adapter),
    "PEFT's format, full": Kind(make_directory("plain", "full", "peft"), read_adapter),
    "PEFT's format, head": Kind(make_directory("head", "topk", "peft"), read_adapter),
    "PEFT's format, layers": Kind(make_directory("some", "topk", "peft"), read_adapter),
    "native, cut": Kind(make_directory("cut", "topk", "native"), read_adapter),
    "native, head, full": Kind(make_directory("head", "full", "native"), read_adapter),
    "native, split": Kind(make_directory("split", "topk", "native"), read_adapter),
    "native, Tied-LoRA": Kind(make_directory("tied", "topk", "native"), read_adapter),
    "native, LoRA-XS": Kind(make_directory("xs", "topk", "native"), read_adapter),
    "without checksum, PEFT's": Kind(make_old("head"), read_adapter),
    "without checksum, native": Kind(make_old("cut"), read_adapter),
    "packed": Kind(make_packed("plain"), read_adapter),
    "packed, int8": Kind(make_packed("head", bank="int8", weights=8, heads="int8"), read_adapter),
    "packed, int4": Kind(make_packed("head", bank="int4", weights=8, heads="int8"), read_adapter),
    "packed, shared bank": Kind(make_packed("some", bank="shared", weights=16), read_adapter),
    "packed, from the seed": Kind(make_drawn, read_adapter),
    "packed, split": Kind(make_packed("split"), read_adapter),
    "packed, Tied-LoRA": Kind(make_packed("tied"), read_adapter),
    "packed, LoRA-XS": Kind(make_packed("xs"), read_adapter),
    "selection log": Kind(make_log, read_log),
    "progress": Kind(make_progress, read_progress),
    "record": Kind(make_record, read_record),
    "table": Kind(make_table, read_table),
    "GLUE data": Kind(make_glue, read_glue),
}
UNMARKED = ("without checksum, PEFT's", "without checksum, native")  # what such a file was cannot be told


# --- Trying ---------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """A case has taken too long."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind: str, folder: Path, sound: Any, how: str) -> str:
    """What came of reading a changed file: "refused", "unharmed", "taken" (forged or unmarked), or what is wrong."""
    try:
        with within(SECONDS):
            found = KINDS[kind].read(folder)
    except (ValueError, FileNotFoundError):
        return "refused"
    except Hang:
        return f"hang: {kind}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/vblora" in frame.filename] or frames
        return f"{type(error).__name__} in {Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}: {error!s:.80}"
    if found is None:
        return "taken"
    if same(found, sound):
        return "unharmed"
    return "taken" if how == "forged" or kind in UNMARKED else f"another adapter, silently: {kind}"


def same(one: Any, other: Any) -> bool:
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())
    )


def fuzz(cases: int, seed: int) -> dict[str, Any]:
    """How many cases had which outcome, by kind; and what went wrong, each with the first case's number."""
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}
    wrong: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        sound = {kind: Path(place) / "sound" / str(number) for number, kind in enumerate(KINDS)}
        states = {}
        for kind, folder in sound.items():
            folder.mkdir(parents=True)
            KINDS[kind].make(folder)
            states[kind] = KINDS[kind].read(_copied(folder, Path(place)))
        for number in bars.bar(range(cases), "cases"):
            kind = list(KINDS)[number % len(KINDS)]
            rng = random.Random(f"{seed} {number}")
            folder = _copied(sound[kind], Path(place))
            how = change(folder, rng)
            found = outcome(kind, folder, states[kind], how)
            if found in ("refused", "unharmed", "taken"):
                counts[kind][f"{how}, {found}"] += 1
            else:
                counts[kind]["wrong"] += 1
                wrong.setdefault(found, {"kind": kind, "case": number, "times": 0})["times"] += 1
    return {
        "cases": cases,
        "seed": seed,
        "outcomes": {k: dict(sorted(c.items())) for k, c in counts.items()},
        "wrong": wrong,
    }


def _copied(folder: Path, place: Path) -> Path:
    copy = place / "case"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


def table(found: dict[str, Any]) -> str:
    """The outcomes by kind, and what went wrong."""
    columns = [f"{how}, {what}" for how in ("damaged", "forged") for what in ("refused", "unharmed", "taken")] + [
        "wrong"
    ]
    lines = [f"| {found['cases']:,} cases | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    for kind, counts in found["outcomes"].items():
        lines.append(f"| {kind} | {' | '.join(str(counts.get(column, 0)) for column in columns)} |")
    lines.append(f"peak memory {found['peak_memory_mib']} MiB")
    for what, of in found["wrong"].items():
        lines.append(f"WRONG {what} (case {of['case']}, {of['kind']}, {of['times']} times)")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = fuzz(options.cases, options.seed)
    found["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    text = table(found)
    print(text)
    if options.record is not None:
        write_json(options.record, {"benchmark": "fuzz", **found, "printed": text.split("\n"), **environment()})
    if found["wrong"]:
        raise ValueError(f"{sum(of['times'] for of in found['wrong'].values())} cases went wrong")


if __name__ == "__main__":
    commands.run(main, "fuzz")
