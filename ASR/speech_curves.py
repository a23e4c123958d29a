"""The loss on the development part over the steps, from the records of runs: a picture with a panel for each language.

    python ASR/speech_curves.py results/asr docs/figures/speech.png
    python ASR/speech_curves.py results/asr runs/asr --language it --model tiny_en FILE.png

Each method is a line through the means of its seeds, with a point for each seed. Runs of one row and language under
other flags (a search for rates) are lines of their own, and those on other layers have a panel of their own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from asr_rows import MODELS
from reproduce_asr import MODEL_TITLES, TITLES
from vblora.io import replacing
from vblora_experiments import commands, records
from vblora_experiments.runs import real_flags

Panels = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # the records of each line, by panel and name
COLOURS = {title: f"C{number}" for number, title in enumerate(TITLES.values())}  # a method's is the same in all panels
OF_LANGUAGE = ("language", "language_token", "max_new_tokens")  # what a row has of its language


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORDS", help="folders with records, or records")
    parser.add_argument("picture", type=Path, metavar="FILE", help=".png, .svg or .pdf")
    parser.add_argument("--model", choices=MODELS, help="of one model alone")
    parser.add_argument("--language", help="of one language alone")
    options = parser.parse_args(arguments)
    if options.picture.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{options.picture}: its name must end with .png, .svg or .pdf")
    found = [record for _, record in records.read_files(options.records, "asr") if record.get("row")]
    panels = grouped(found, options.model, options.language)
    if not panels:
        raise ValueError("the records hold no curve of a trained row of this model and language")
    draw(panels, options.picture)
    print(f"{options.picture}: {sum(map(len, panels.values()))} lines, {len(panels)} panels")


def grouped(found: Sequence[dict[str, Any]], model: str | None, language: str | None) -> Panels:
    """The records that have a curve, by panel and by line."""
    panels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in found:
        own, method = record["row"].split("/")
        if record.get("curve") and model in (None, own) and language in (None, record["language"]):
            flags = {name: v for name, v in real_flags(record["overrides"]).items() if name not in OF_LANGUAGE}
            line = ", ".join([TITLES[method], *(f"{name} {value}" for name, value in flags.items())])
            panel = f"{MODEL_TITLES[own]}, {record['language']}" + (", other layers" if "targets" in flags else "")
            panels.setdefault(panel, {}).setdefault(line, []).append(record)
    return panels


def line_through(group: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """The steps that all records of a line were evaluated at, each with the mean of the losses."""
    losses = [{point["step"]: point["loss"] for point in record["curve"]} for record in group]
    shared = sorted(set.intersection(*map(set, losses)))
    return [(step, mean(of_run[step] for of_run in losses)) for step in shared]


def draw(panels: Panels, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 6.5), squeeze=False, layout="constrained"
    )
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        of_other_rows = (f"C{number}" for number in itertools.cycle(range(10)))
        for name, group in lines.items():
            colour, stored = COLOURS.get(name) or next(of_other_rows), group[0]["stored_parameters"]["parameters"]
            for record in group:
                for point in record["curve"]:
                    axis.plot(point["step"], point["loss"], ".", color=colour, alpha=0.4)
            axis.plot(*zip(*line_through(group), strict=True), color=colour, label=f"{name}: {stored:,} numbers")
        axis.set(xlabel="step", ylabel="loss on the development part", title=title)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format=path.suffix.removeprefix("."))
    pyplot.close(figure)


if __name__ == "__main__":
    commands.run(main, "speech_curves")
