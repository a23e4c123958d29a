"""How a training step's time and state grow: PEFT's LoRA, PEFT's VB-LoRA, and VB-LoRA here.

    python benchmarks/growth.py [--axes h layers] [--rounds 7] --record results/growth.json
    python benchmarks/growth.py --plot results/growth.json [--figures docs/figures]

One of h, layers, r, k, tokens of a row and rows is varied at a time from a small Llama (4 layers, 256 wide, h 256,
b 64, r 4, k 2, 4 rows of 64 tokens, all linear layers). Forward, backward and optimiser step; the three take turns, at
all values of what is varied, and figures are medians of the rounds. State is what training keeps beside the base
model, as in step_time.py. --plot draws growth_time.png and growth_state.png from a record and measures nothing.

Last result (results/speed/growth.json, CPU): 0.86 to 1.02 of LoRA's time; no growth with h.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step_time import DECODER, HERE, LORA, PEFT, WAYS, Shape, state_bytes, step
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from turns import medians, parser, ratios, report, require_positive, take_turns

from vblora.io import read_json, replacing
from vblora_experiments import commands

WIDTH, VECTOR_LENGTH, VOCABULARY = 256, 64, 256
Way = tuple[nn.Module, torch.optim.Optimizer]


@dataclass(frozen=True)
class Point:
    """What is varied; the defaults are the model that all else is varied from."""

    h: int = 256
    layers: int = 4
    r: int = 4
    k: int = 2
    length: int = 64
    batch: int = 4


AXES = {
    "h": [64, 128, 256, 512, 1024, 2048, 4096, 8192],
    "layers": [1, 2, 4, 8, 12, 16],
    "r": [1, 2, 4, 8, 16, 32],
    "k": [1, 2, 4, 8, 16],
    "length": [16, 32, 64, 128, 256, 512],
    "batch": [1, 2, 4, 8, 16, 32],
}
TITLES = {
    "h": "vectors in the bank, h",
    "layers": "layers",
    "r": "rank, r",
    "k": "vectors in a mixture, k",
    "length": "tokens of a row",
    "batch": "rows",
}
STATE_AXES = ("h", "layers", "r", "k")  # the others do not enter
COMPARED = (LORA, PEFT, HERE)
COLOURS = {LORA: "#0072B2", PEFT: "#D55E00", HERE: "#009E73"}
MARKS = {LORA: "s", PEFT: "^", HERE: "o"}


def main(arguments: list[str]) -> None:
    options_of = parser(__doc__, rounds=7)
    options_of.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    options_of.add_argument("--points", type=int, default=10, help="at most this many values of each")
    options_of.add_argument("--plot", type=Path, metavar="RECORD", help="only draw the pictures of this record")
    options_of.add_argument("--figures", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "figures")
    options = options_of.parse_args(arguments)
    require_positive(options, "rounds", "points")
    if options.plot is not None:
        for file in draw(read_json(options.plot), options.figures):
            print(file)
        return
    found = {axis: grow(axis, AXES[axis][: options.points], options.rounds) for axis in options.axes}
    figures = {"rounds": options.rounds, "default": asdict(Point()), "axes": found}
    report("growth", figures, render(found), options.record)


# ------------------------------------------------------------------------------------------ measuring


def grow(axis: str, values: list[int], rounds: int) -> list[dict[str, Any]]:
    """Seconds and state of each way at each value of one axis; all values take turns, as the ways do."""
    ways: dict[str, Way] = {}
    steps: dict[str, Callable[[], float]] = {}
    for value in values:
        point = replace(Point(), **{axis: value})
        base, ids = build(point)
        for name in COMPARED:
            key = f"{value} {name}"
            ways[key] = WAYS[name](copy.deepcopy(base), shape(point))
            steps[key] = partial(step, *ways[key], ids, ids, 1)
    seconds = take_turns(steps, rounds, warm_up=2)
    at = {value: {name: seconds[f"{value} {name}"] for name in COMPARED} for value in values}
    return [
        {
            "value": value,
            "seconds": medians(at[value]),
            "times_lora": ratios(at[value], LORA),
            "state_bytes": {name: state_bytes(*ways[f"{value} {name}"]) for name in COMPARED},
        }
        for value in values
    ]


def shape(point: Point) -> Shape:
    """What step_time.py's ways need to know of a point."""
    settings = {"r": point.r, "num_vectors": point.h, "vector_length": VECTOR_LENGTH, "topk": point.k}
    return Shape(lambda: build(point)[0], DECODER, settings, point.batch, point.length)


def build(point: Point) -> tuple[nn.Module, torch.Tensor]:
    """The base model, and a batch."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size: Any = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=point.layers, **size))
    return model.to(device), torch.randint(3, VOCABULARY, (point.batch, point.length), device=device)


def render(found: Mapping[str, list[dict[str, Any]]]) -> str:
    heads = [f"{way}, {what}" for what in ("ms", "times LoRA's", "state MB") for way in COMPARED]
    lines = [f"| | | {' | '.join(heads)} |", "|---|---:|" + "---:|" * len(heads)]
    for axis, points in found.items():
        for point in points:
            times = " | ".join(f"{1000 * point['seconds'][way]:.1f}" for way in COMPARED)
            states = " | ".join(f"{point['state_bytes'][way] / 1e6:.2f}" for way in COMPARED)
            beside = " | ".join(f"{point['times_lora'][way]:.2f}" for way in COMPARED)
            lines.append(f"| {axis} | {point['value']} | {times} | {beside} | {states} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ drawing


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """The two pictures of a record.

    Raises:
        ValueError: it is no record of this benchmark.
    """
    if record.get("benchmark") != "growth":
        raise ValueError("--plot takes a record that this benchmark wrote (--record)")
    axes = record["axes"]
    time = [axis for axis in AXES if axis in axes]
    state = [axis for axis in STATE_AXES if axis in axes]
    files = [_picture(record, time, "seconds", 1e3, "ms a step", folder / "growth_time.png")]
    if state:
        files.append(_picture(record, state, "state_bytes", 1e-6, "training state, MB", folder / "growth_state.png"))
    return files


def _picture(record: Mapping[str, Any], axes: list[str], what: str, scale: float, unit: str, file: Path) -> Path:
    """One panel for each axis, and one legend above all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2 if len(axes) in (2, 4) else min(3, len(axes))
    rows = -(-len(axes) // columns)
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(rows, columns, figsize=(4.3 * columns, 3.5 * rows + 0.6), squeeze=False)
    for panel in panels.flat[len(axes) :]:
        panel.set_visible(False)
    for panel, axis in zip(panels.flat, axes, strict=False):
        _panel(panel, axis, record["axes"][axis], what, scale)
    for panel in panels[:, 0]:
        panel.set_ylabel(unit)
    lines, names = panels.flat[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="upper center", ncols=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / (3.5 * rows + 0.6)))
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    return file


def _panel(panel: Any, axis: str, points: list[dict[str, Any]], what: str, scale: float) -> None:
    """Time or state by one axis, on straight axes, so that linear growth is a line; state by h on two logarithmic ones,
    where it is a line too and small banks can be seen."""
    values = [point["value"] for point in points]
    for way in COMPARED:
        panel.plot(
            values,
            [point[what][way] * scale for point in points],
            color=COLOURS[way],
            marker=MARKS[way],
            linewidth=2,
            label=way,
        )
    panel.set_xlabel(TITLES[axis])
    panel.grid(alpha=0.3)
    if axis == "h" and what == "state_bytes":
        panel.set_xscale("log", base=2)
        panel.set_xticks(values[::2], [str(value) for value in values[::2]])
        panel.set_yscale("log")
        panel.minorticks_off()
    else:
        panel.set_ylim(bottom=0)


if __name__ == "__main__":
    commands.run(main, "growth")
