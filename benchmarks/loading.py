"""Time from an adapter's file to the model's first output, and of switching to another adapter: here and in PEFT.

    python benchmarks/loading.py [--layers 12] [--width 768] [--rounds 5] [--record FILE]

The base model is in memory, without an adapter. Opening: `vblora.load` of the top-k directory and of the packed file,
`vblora.AdapterStore` over a folder of packed files, PEFT's PeftModel.from_pretrained of VB-LoRA and of LoRA; each with
one forward pass of 16 tokens. Switching: the store between two adapters whose factors it has, and a new `vblora.load`
of the packed file, beside PEFT's set_adapter between two that are loaded, and its load_adapter; each with one forward
pass too. The pass of the base model alone stands beside them. Random weights; the ways take turns.

Last result (results/speed/loading.json, CPU): a file is open in 11 to 14 ms, in PEFT in 160.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import peft
import torch
from torch import Tensor
from turns import Seconds, medians, parser, report, require_positive, take_turns, timed

import vblora
from vblora_experiments import commands

TOKENS = 16
NAMES = ("one", "two")
BASE = "the base model's pass"
STORE = "AdapterStore"


def main(arguments: list[str]) -> None:
    options_of = parser(__doc__, rounds=5)
    options_of.add_argument("--layers", type=int, default=12)
    options_of.add_argument("--width", type=int, default=768)
    options = options_of.parse_args(arguments)
    require_positive(options, "rounds", "layers", "width")
    base = adapters.llama(options.width, options.layers)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for seed, name in enumerate(NAMES):
            adapters.write(base, Path(folder) / name, seed)
        results = measure(base, Path(folder), options.rounds)
    shape = {"layers": options.layers, "width": options.width}
    report("loading", {**shape, **results}, render(results), options.record)


def measure(base: Any, folder: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of opening and of switching by each way, and the bytes of the files read."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 1000, (1, TOKENS), generator=generator)
    opening = take_turns(opening_ways(base, folder / NAMES[0], ids), rounds)
    return {
        "rounds": rounds,
        "opening_ms": _ms(opening),
        "switching_ms": _ms(take_turns(switching_ways(base, folder, ids), rounds)),
        "bytes": {name: _bytes(folder / NAMES[0] / name) for name in (adapters.TOPK, adapters.PACKED, adapters.LORA)},
    }


def _ms(seconds: Seconds) -> dict[str, float]:
    return {name: 1000 * taken for name, taken in medians(seconds).items()}


def _bytes(place: Path) -> int:
    return sum(f.stat().st_size for f in (place.iterdir() if place.is_dir() else [place]))


def first_output(model: Any, ids: Tensor) -> None:
    model(input_ids=ids)


# ------------------------------------------------------------------------------------------ opening


def opening_ways(base: Any, place: Path, ids: Tensor) -> dict[str, Callable[[], float]]:
    """Each opens the adapter, has one output, and takes the adapter off again, which is not timed."""

    def ours(file: str) -> float:
        def opened() -> None:
            vblora.load(base, str(place / file))
            first_output(base, ids)

        taken = timed(opened)
        base.vblora_adapter.detach()
        return taken

    def store() -> float:
        opened = vblora.AdapterStore(base)
        opened.add("one", place / adapters.PACKED)
        taken = timed(lambda: with_rows(opened, "one", ids))
        opened.close()
        return taken

    def theirs(directory: str) -> float:
        wrapped = []

        def opened() -> None:
            wrapped.append(peft.PeftModel.from_pretrained(base, str(place / directory)).eval())
            first_output(wrapped[0], ids)

        taken = timed(opened)
        wrapped[0].unload()
        return taken

    return {
        BASE: lambda: timed(lambda: first_output(base, ids)),
        "vblora.load, top-k directory": lambda: ours(adapters.TOPK),
        "vblora.load, packed file": lambda: ours(adapters.PACKED),
        f"{STORE}, packed file": store,
        "VB-LoRA in PEFT, from_pretrained": lambda: theirs(adapters.TOPK),
        "LoRA in PEFT, from_pretrained": lambda: theirs(adapters.LORA),
    }


def with_rows(store: vblora.AdapterStore, name: str, ids: Tensor) -> None:
    with store.rows([name]):
        first_output(store.model, ids)


# ------------------------------------------------------------------------------------------ switching


def switching_ways(base: Any, folder: Path, ids: Tensor) -> dict[str, Callable[[], float]]:
    """Each goes from one of two adapters to the other; every way has a model of its own."""
    store = vblora.AdapterStore(copy.deepcopy(base))
    for name in NAMES:
        store.add(name, folder / name / adapters.PACKED)
    ways: dict[str, Callable[[], float]] = {
        BASE: lambda: timed(lambda: first_output(base, ids)),
        f"{STORE}, composed": _alternately(lambda name: with_rows(store, name, ids)),
        "detach and vblora.load, packed file": _reloading(copy.deepcopy(base), folder, ids),
    }
    for kind, directory in (("VB-LoRA", adapters.TOPK), ("LoRA", adapters.LORA)):
        wrapped = adapters.with_peft(base, folder / NAMES[0] / directory, NAMES[0])
        wrapped.load_adapter(str(folder / NAMES[1] / directory), adapter_name=NAMES[1])
        ways[f"{kind} in PEFT, set_adapter"] = _setting(wrapped, ids)
        ways[f"{kind} in PEFT, load_adapter"] = _loading(wrapped, folder / NAMES[1] / directory, ids)
    return ways


def _alternately(use: Callable[[str], None]) -> Callable[[], float]:
    """Times `use` of the one and of the other name by turns."""
    calls = [0]

    def way() -> float:
        calls[0] += 1
        return timed(lambda: use(NAMES[calls[0] % 2]))

    return way


def _reloading(model: Any, folder: Path, ids: Tensor) -> Callable[[], float]:
    vblora.load(model, str(folder / NAMES[0] / adapters.PACKED))

    def use(name: str) -> None:
        model.vblora_adapter.detach()
        vblora.load(model, str(folder / name / adapters.PACKED))
        first_output(model, ids)

    return _alternately(use)


def _setting(wrapped: Any, ids: Tensor) -> Callable[[], float]:
    def use(name: str) -> None:
        wrapped.set_adapter(name)
        first_output(wrapped, ids)

    return _alternately(use)


def _loading(wrapped: Any, directory: Path, ids: Tensor) -> Callable[[], float]:
    """Loads a third adapter beside the two, has an output of it, and takes it away again, which is not timed."""

    def use() -> None:
        wrapped.load_adapter(str(directory), adapter_name="third")
        wrapped.set_adapter("third")
        first_output(wrapped, ids)

    def way() -> float:
        taken = timed(use)
        wrapped.set_adapter(NAMES[0])
        wrapped.delete_adapter("third")
        return taken

    return way


def render(results: dict[str, Any]) -> str:
    lines = []
    for what, head in (("opening_ms", "from file to first output"), ("switching_ms", "switching, and an output")):
        found = results[what]
        lines += [f"| {head} | ms | without the pass |", "|---|---:|---:|"]
        lines += [f"| {way} | {taken:.1f} | {max(0.0, taken - found[BASE]):.1f} |" for way, taken in found.items()]
        lines.append("")
    read = ", ".join(f"{name} {size:,}" for name, size in results["bytes"].items())
    return "\n".join([*lines, f"Bytes read: {read}."])


if __name__ == "__main__":
    commands.run(main, "loading")
