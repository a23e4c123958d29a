"""The pictures of docs/recipe.md: scores over epochs, steps, seconds and bytes, from the records of recipe_study.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from vblora.io import replacing

Record = Mapping[str, Any]
Found = Mapping[tuple[str, int, str, int], Record]  # task, epochs, row, seed
Curve = Sequence[tuple[float, float]]


def _epochs(record: Record) -> float:
    return float(record["settings"]["num_train_epochs"])


def _seconds(record: Record) -> float:
    if record.get("train_seconds") is None:
        raise ValueError(f"the record of {record['method']}, seed {record['seed']}, has no seconds to draw over")
    return float(record["train_seconds"])


# What the score is drawn over: what a whole run has of it. A score after e of E epochs stands at e / E of that.
OVER: Mapping[str, Callable[[Record], float]] = {
    "epochs": _epochs,
    "steps": lambda record: record["steps"],
    "seconds": _seconds,
    "bytes": lambda record: record["stored_parameters"]["bytes"],
}


def draw(found: Found, over: Sequence[str], path: Path) -> None:
    """A row of panels for each task and number of epochs, and a panel for each of `over`.

    Each method is a line through the means of its seeds, with a point for each seed; over bytes, which training does
    not change, a point for each seed's last score and a line as long as they are apart.
    """
    if not found:
        raise ValueError("no run of these has a record: there is nothing to draw")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = list(dict.fromkeys(key[:2] for key in found))
    size = (5.0 * max(len(over), 1), 4.0 * len(parts))
    figure, axes = pyplot.subplots(len(parts), len(over), figsize=size, squeeze=False, layout="constrained")
    for (task, epochs), panels in zip(parts, axes, strict=True):
        groups = {name: _group(found, (task, epochs, name)) for name in _rows(found, (task, epochs))}
        for what, axis in zip(over, panels, strict=True):
            for number, (name, group) in enumerate(groups.items()):
                _method(axis, what, name, group, f"C{number}")
            axis.set_xlim(left=0)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.tick_params(axis="x", labelrotation=20)
            axis.set(xlabel=what, ylabel=_metric(group).replace("_", " "), title=f"{task}, {epochs} epochs")
        panels[0].legend(loc="lower right", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format=path.suffix.removeprefix("."))
    pyplot.close(figure)


def _method(axis: Any, what: str, name: str, group: Sequence[Record], colour: str) -> None:
    stored = group[0]["stored_parameters"]["parameters"]
    label = f"{name}: {stored:,} numbers, {len(group)} seed{'s' if len(group) > 1 else ''}"
    curves = [curve(record, what) for record in group]
    for points in curves:
        axis.plot(*zip(*points, strict=True), ".", color=colour, alpha=0.4)
    if what == "bytes":
        line: Curve = [points[-1] for points in curves]
    else:
        line = [tuple(map(mean, zip(*points, strict=True))) for points in zip(*curves, strict=True)]
    axis.plot(*zip(*line, strict=True), color=colour, label=label)


def curve(record: Record, what: str) -> list[tuple[float, float]]:
    """The score, times 100, over one of `OVER`."""
    whole, metric = OVER[what](record), _metric([record])
    scores = [(one["epoch"] / _epochs(record), 100 * one[metric]) for one in record["scores"]["epochs"]]
    return [(whole, scores[-1][1])] if what == "bytes" else [(share * whole, score) for share, score in scores]


def _metric(group: Sequence[Record]) -> str:
    return group[0]["scores"]["metric"]


def _rows(found: Found, part: tuple[str, int]) -> list[str]:
    return list(dict.fromkeys(key[2] for key in found if key[:2] == part))


def _group(found: Found, group: tuple[str, int, str]) -> list[Record]:
    return [record for key, record in found.items() if key[:3] == group]
