"""The page's pictures: SVG to stand in HTML, with the page's own colour and font for text, and links to its lines.

A picture is drawn for the width of a phone. Nothing in it comes from a record but numbers.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import mean
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from vblora_experiments.report.found import Line, Table
from vblora_experiments.selection_log import Selections

# Okabe and Ito's colours, which colour-blind readers tell apart, but those that vanish on white or black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#888888")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆"}  # as drawn, and in the legend
INK = "#010203"  # stands for the colour of the page's text
WIDTH = 4.6  # inches, of 72 units: a phone shows them at about their size
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
MAP_ROWS = 96  # sub-vectors of a footprint that are shown


class Mark(NamedTuple):
    """How a line of a table looks in its pictures."""

    colour: str
    marker: str

    @property
    def sign(self) -> str:
        return MARKERS[self.marker]


def marks_of(table: Table) -> list[Mark]:
    """A mark for each line: all colours, then all again with the next marker."""
    every = [Mark(colour, marker) for marker in MARKERS for colour in COLOURS]
    return list(itertools.islice(itertools.cycle(every), len(table.lines)))


def curves(table: Table) -> str | None:
    """The curves of a table's lines, each through the mean of its seeds; None where no run has two points."""
    drawn = [(line, mark) for line, mark in zip(table.lines, marks_of(table), strict=True) if _curve(line)]
    if not drawn:
        return None
    figure, axes = _figure(2.9)
    for line, mark in drawn:
        points = _curve(line)
        style = {"marker": mark.marker, "markersize": 3, "linewidth": 1.2}
        axes.plot(*zip(*points, strict=True), color=mark.colour, **style)  # type: ignore[arg-type]
    first = next(run.curve for line, _ in drawn for run in line.runs if run.curve is not None)
    axes.set(xlabel=first.x, ylabel=first.y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure)


def _curve(line: Line) -> list[tuple[float, float]]:
    """The points that all seeds of a line have, with the mean of their values; none for fewer than two."""
    of_runs = [dict(run.curve.points) for run in line.runs if run.curve is not None]
    if not of_runs:
        return []
    shared = sorted(set.intersection(*map(set, of_runs)))
    return [(x, mean(points[x] for points in of_runs)) for x in shared] if len(shared) > 1 else []


def sizes(table: Table) -> str | None:
    """The first score against the adapter's bytes, each point a link to its line; None for fewer than two points."""
    score = table.scores[0] if table.scores else ""
    found = [(line, mark, line.middle(score)) for line, mark in zip(table.lines, marks_of(table), strict=True)]
    points = [(line, mark, y) for line, mark, y in found if y is not None and line.stored["bytes"] > 0]
    if len(points) < 2:
        return None
    figure, axes = _figure(2.9)
    for line, mark, y in points:
        deviation = line.deviation(score)
        if deviation is not None:
            axes.errorbar(line.stored["bytes"], y, deviation, color=mark.colour, alpha=0.5, linewidth=1)
        point = axes.scatter([line.stored["bytes"]], [y], color=mark.colour, marker=mark.marker, s=28, zorder=3)
        point.set_urls([f"@{line.at}"])
    axes.set(xscale="log", xlabel="bytes of the adapter, without the head", ylabel=score)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    return _svg(figure)


class Statistics(NamedTuple):
    """How a run selects, after each epoch from before the first on; `changes` has a number for each epoch.

    Attributes:
        epochs: (E + 1,)
        in_use: (E + 1,) the share of the bank's vectors that some sub-vector selects.
        entropy: (E + 1,) of a sub-vector's weights, their mean; from 0 (one vector) to 1 (k equal weights).
        changes: (E,) the share of sub-vectors whose vectors change in a step.
        ever: the share of the bank's vectors that were selected after some step.
    """

    epochs: np.ndarray
    in_use: np.ndarray
    entropy: np.ndarray
    changes: np.ndarray
    ever: float


def statistics_of(log: Selections, steps: int) -> Statistics:
    """The numbers of a log of a run with so many steps. An epoch of s steps has s - 1 between two of its steps."""
    h, (n, k) = log.num_vectors, log.indices.shape[1:]
    in_use = np.array([len(np.unique(indices)) / h for indices in log.indices])
    weights = np.clip(log.weights, 1e-12, 1)
    entropy = -(log.weights * np.log(weights)).sum(-1).mean(-1) / np.log(k) if k > 1 else np.zeros(len(in_use))
    between = max(steps / len(log.changes) - 1, 1)
    ever = float(log.footprints.any(axis=(0, 1)).mean())
    return Statistics(log.epochs, in_use, entropy, log.changes / n / between, ever)


def selection(log: Selections, found: Statistics) -> str:
    """Which vectors sub-vectors selected, how many select each vector in the end, and the numbers by epoch."""
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    over, below, last = figure.subplots(3, 1, height_ratios=(2, 1, 1.3))
    h, n = log.num_vectors, len(log.indices[-1])
    _draw_map(over, log)
    counts = np.bincount(log.indices[-1].ravel(), minlength=h)
    below.stairs(counts, np.arange(h + 1) - 0.5, fill=True, color=COLOURS[0])
    below.set(xlim=(-0.5, h - 0.5), xlabel="vector of the bank", ylabel=f"uses by {n}")
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]] = {
        "bank in use": (found.epochs, found.in_use),
        "entropy": (found.epochs, found.entropy),
        "changes a step": (found.epochs[1:], found.changes),
    }
    for (name, (x, y)), colour, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
        last.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=1.2, label=name)
    last.set(xlabel="epoch", ylabel="share", ylim=(-0.03, 1.03))
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return _svg(figure)


def _draw_map(axes: Axes, log: Selections) -> None:
    """A picture element for a vector and a sub-vector: full where selected in the end, pale where ever before."""
    n, h = len(log.indices[-1]), log.num_vectors
    rows = np.linspace(0, n - 1, min(n, MAP_ROWS)).round().astype(int)
    ever = np.any(log.footprints, axis=0)[rows]  # (rows, h)
    now = np.zeros((len(rows), h), dtype=bool)
    np.put_along_axis(now, log.indices[-1][rows], True, axis=1)
    cells = np.zeros((len(rows), h, 4), dtype=np.uint8)
    red, green, blue = (int(COLOURS[0][at : at + 2], 16) for at in (1, 3, 5))
    cells[ever | now] = (red, green, blue, 80)
    cells[now] = (red, green, blue, 255)
    axes.imshow(cells, aspect="auto", interpolation="nearest", extent=(-0.5, h - 0.5, len(rows), 0))
    axes.set(ylabel=f"{len(rows)} of {n} sub-vectors", yticks=[], xticks=[])


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


_count = itertools.count()


def drawing() -> AbstractContextManager[Any]:
    """The style that the functions above draw in, as a context."""
    return matplotlib.rc_context(STYLE)


def _svg(figure: Figure) -> str:
    """The figure as an element for HTML, with names of its own in the page."""
    file = io.StringIO()
    nothing: Mapping[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=dict(nothing))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    own = f"c{next(_count)}-"
    for size in ("width", "height"):  # the page's style gives them
        text = re.sub(rf'(<svg [^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would be the whole page's
    text = re.sub(r" font-family: [^;]*;", "", text)
    text = re.sub(r"(\d\.\d{2})\d+", r"\1", text)
    text = text.replace(' id="', f' id="{own}').replace("url(#", f"url(#{own}").replace('href="#', f'href="#{own}')
    text = text.replace('xlink:href="@', 'href="#').replace(INK, "currentColor")
    return re.sub(r"\n\s*", "\n", text)


def legend(table: Table) -> Sequence[tuple[str, str, Line]]:
    """The sign, the colour and the line of each mark."""
    return [(mark.sign, mark.colour, line) for mark, line in zip(marks_of(table), table.lines, strict=True)]
