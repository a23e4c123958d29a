"""The paper's Figures 1 and 3 to 9, from run records and the logs of what was selected.

    ./scripts/figures.sh                                                   # of results/glue_minilm, into docs/figures
    ./scripts/figures.sh --records runs/glue --model roberta_large --figures 3 4 --output /tmp/figures

1 is drawn from the records of Table 1; 5 to 9 from the log of the row "vblora_qv", 3 from its and three variants' of
Table 5, 4 from the longest sub-vectors of Table 6. A log lies in FOLDER/selections/NAME.safetensors beside collected
records, or in the run's own folder. Where a figure's runs are missing, the others are still drawn.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

import paper
import table
from experiments import ABLATIONS, TABLE_1, Trial, ablation, table1
from hyperparameters import METHODS, MODELS
from reproduce import SIZES
from vblora.io import replacing
from vblora.models import RECORD_FILE
from vblora_experiments import commands
from vblora_experiments.records import SELECTIONS_FILE
from vblora_experiments.selection_log import Selections, read_log

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "results" / "glue_minilm"
OUTPUT = ROOT / "docs" / "figures"
SIZE_OF = {model: size for size, model in SIZES.items()}

METHOD = "vblora_qv"
FOOTPRINT_VARIANTS = {"top1": "top-1", "top2": "top-2", "top3": "top-3", "noisy_top2": "noisy top-2"}
PAPER_MODEL = "roberta_large"  # of the paper's own points beside Figure 1
FOOTPRINT_ROWS, OVERLAP_ROWS, OVERLAP_VECTORS = 96, 192, 30  # as many as the paper shows
THIRDS = ("first third", "middle third", "last third")

# Okabe and Ito's colours, which colour-blind readers tell apart; pale ones of the same hue for what is behind.
BLUE, ORANGE, VERMILION, GREEN, BLACK = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#000000"
PALE_BLUE, WHITE, GREY = "#9CCBEA", "#FFFFFF", "#777777"
DPI = 120
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 13,
    "figure.titlesize": 14,
    "legend.fontsize": 12,
    "axes.linewidth": 0.8,
}


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    source = Source.of(options.records, options.task, options.model)
    errors: dict[str, list[int]] = {}
    for number in options.figures:
        try:
            with matplotlib.rc_context(STYLE):
                figure = FIGURES[number](source)
                path = options.output / f"figure{number}.png"
                save(figure, path)
        except ValueError as error:
            errors.setdefault(str(error), []).append(number)
        else:
            print(path)
    if errors:
        raise ValueError("; ".join(f"figure {', '.join(map(str, numbers))}: {e}" for e, numbers in errors.items()))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="figures.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--records", nargs="+", type=Path, default=[RECORDS], help="folders of records or of runs; results/glue_minilm"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="docs/figures unless given")
    parser.add_argument(
        "--figures", nargs="+", type=int, choices=FIGURES, default=list(FIGURES), help="all if left out"
    )
    parser.add_argument("--model", choices=MODELS, help="the one that the records are of unless given")
    parser.add_argument("--task", choices=paper.TASKS, default="cola")
    return parser.parse_args(arguments)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, in one step."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


# Where the figures' data come from.


class Run(NamedTuple):
    """A trial and the log of what it selected."""

    trial: Trial
    log: Selections

    @property
    def epochs(self) -> int:
        return len(self.log.footprints)

    @property
    def title(self) -> str:
        what = f"{table.MODEL_TITLES[self.trial.model]}, {table.TASK_TITLES[self.trial.task]}"
        return (
            f"{what}, {table.method_title(self.trial.method)}, {counted(self.epochs, 'epoch')}, seed {self.trial.seed}"
        )


@dataclass(frozen=True)
class Source:
    """The records of one model and task: those of each folder, and where the logs beside them are."""

    folders: dict[Path, list[dict[str, Any]]]
    model: str
    task: str

    @classmethod
    def of(cls, folders: Sequence[Path], task: str, model: str | None) -> Source:
        """Read the folders.

        Raises:
            ValueError: a folder is missing, no record is of this task, or its records are of several models.
        """
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"no folder {folder}; {_command(TABLE_1, model or 'minilm', task, folder)} makes it")
        found = {folder: table.read([folder], required=False) for folder in folders}
        rows = [record["row"].split("/") for records in found.values() for record in records if record.get("row")]
        models = sorted({row[0] for row in rows if row[1] == task})
        if not models:
            where = ", ".join(map(str, folders))
            command = _command(TABLE_1, model or "minilm", task, folders[0])
            raise ValueError(f"no run record of {task} in {where}; {command} makes them")
        if model is None and len(models) > 1:
            raise ValueError(f"records of several models: {', '.join(models)}; choose one with --model")
        return cls(found, model or models[0], task)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for records in self.folders.values() for record in records]

    @property
    def seeds(self) -> list[int]:
        return sorted({0, *(record["seed"] for record in self.records)})

    def runs(self, experiment: str, names: Sequence[str]) -> list[Run]:
        """The runs of these methods (Table 1) or variants (an ablation), all of one seed: the lowest that has them.

        Raises:
            ValueError: no seed has them all; says what makes those of seed 0.
        """
        for seed in self.seeds:
            trials = self._trials(experiment, names, seed)
            logs = [path for trial in trials if (path := self._log(trial)) is not None and path.exists()]
            if len(logs) == len(trials):
                return [Run(trial, read_log(path)) for trial, path in zip(trials, logs, strict=True)]
        missing, problems = [], []
        for trial in self._trials(experiment, names, 0):
            path = self._log(trial)
            if path is not None and path.exists():
                continue
            missing.append(table.variant_name(trial, experiment))
            problems.append(
                f"no record of {trial.name}"
                if path is None
                else f"{trial.name} has a record but no {path}: remove the record and run it again"
            )
        what = "methods" if experiment == TABLE_1 else "variants"
        command = self.command(experiment, f"--{what} {' '.join(missing)} --seeds 0")
        raise ValueError(f"{', '.join(problems)}; {command} makes {'them' if len(missing) > 1 else 'it'}")

    def command(self, experiment: str, filters: str = "") -> str:
        """What makes the records of an experiment, and puts them where they are looked for."""
        return _command(experiment, self.model, self.task, next(iter(self.folders)), filters)

    def _trials(self, experiment: str, names: Sequence[str], seed: int) -> list[Trial]:
        if experiment == TABLE_1:
            return table1([self.model], names, [self.task], [seed])
        return ablation(experiment, [self.model], [self.task], names, [seed])

    def _log(self, trial: Trial) -> Path | None:
        """Where the log of a trial is, or should be; None if it has no record."""
        places = []
        for folder, records in self.folders.items():
            if any(trial.is_of(record) for record in records):
                of_run, collected = folder / trial.name, folder / "selections" / f"{trial.name}.safetensors"
                places.append(of_run / SELECTIONS_FILE if (of_run / RECORD_FILE).exists() else collected)
        return next((path for path in places if path.exists()), places[0] if places else None)


def _command(experiment: str, model: str, task: str, folder: Path, filters: str = "") -> str:
    resolved = folder.resolve()
    shown = resolved.relative_to(ROOT) if resolved.is_relative_to(ROOT) else folder
    where = "--runs" if any(folder.glob(f"*/{RECORD_FILE}")) else "--collect"
    parts = ["./scripts/reproduce.sh", experiment, f"--sizes {SIZE_OF[model]} --tasks {task}", filters]
    return " ".join(part for part in [*parts, f"{where} {shown}"] if part)


# The figures, each from its runs.


def figure1(source: Source) -> Figure:
    """Score against stored parameters, here and in the paper."""
    trials = table1([source.model], list(METHODS), [source.task], source.seeds)
    cells = table.cells(trials, source.records)
    ours = [Point.of(c.name, c.parameters, c.best, c.best_sd) for c in cells if c.best is not None and c.parameters]
    if not ours:
        raise ValueError(f"no record of Table 1; {source.command(TABLE_1)} makes them")
    at = paper.TASKS.index(source.task)
    papers = [
        Point.of(name, 1e6 * millions, paper.TABLE_1[PAPER_MODEL, name][at], _papers_deviation(name, at))
        for (model, name), millions in paper.PARAMETERS.items()
        if model == PAPER_MODEL
    ]
    metrics = {r["scores"]["metric"] for r in source.records if r["task"] == source.task}
    task, metric = table.TASK_TITLES[source.task], table.METRICS[metrics.pop()]
    seeds = {cell.seeds for cell in cells if cell.seeds}
    of_seeds = f"{min(seeds)} to {max(seeds)} seeds" if len(seeds) > 1 else counted(min(seeds), "seed")
    of_seeds = of_seeds if seeds == {1} else f"median of {of_seeds}"
    epochs = {r["scores"]["last"]["epoch"] for r in source.records if any(t.is_of(r) for t in trials)}
    of_epochs = f"{min(epochs):g} to {max(epochs):g} epochs" if len(epochs) > 1 else counted(min(epochs), "epoch")
    return draw_scores(
        {
            f"{table.MODEL_TITLES[source.model]}, {task}: here\n{of_epochs}, {of_seeds}": ours,
            f"{table.MODEL_TITLES[PAPER_MODEL]}, {task}:\nas printed in the paper (Table 1)": papers,
        },
        f"{metric}{' correlation' if metric in ('Matthews', 'Pearson') else ''}, best epoch (%)",
    )


def _papers_deviation(method: str, at: int) -> float | None:
    printed = paper.STANDARD_DEVIATIONS.get((PAPER_MODEL, method))
    return None if printed is None else printed[at]


def figure3(source: Source) -> Figure:
    """Which vectors were selected at any step, for several k and with noise."""
    panels = {}
    runs = source.runs("table5", list(FOOTPRINT_VARIANTS))
    for run, title in zip(runs, FOOTPRINT_VARIANTS.values(), strict=True):
        ever = footprint(run.log.footprints)
        last = selected(run.log.indices[-1], run.log.num_vectors)
        panels[f"{title}: {ever.mean():.1%} ever selected"] = np.where(last, 2, ever.astype(int))
    states = [(PALE_BLUE, "selected after some step"), (BLUE, "selected after the last epoch")]
    title = f"Selection footprints: {runs[0].title}"
    return draw_cells(panels, states, title, FOOTPRINT_ROWS, columns=2)


def figure4(source: Source) -> Figure:
    """The selections before and after training, with few and long vectors."""
    known = ABLATIONS["table6"].of(source.model)
    [run] = source.runs("table6", [max(known, key=lambda name: known[name]["vector_length"])])
    h = run.log.num_vectors
    states = overlap(selected(run.log.indices[0], h), selected(run.log.indices[-1], h))
    panels = {f"{(states == 3).sum() / (states % 2 == 1).sum():.1%} of the initial selections are final ones": states}
    colours = [(ORANGE, "initial only"), (BLUE, "final only"), (BLACK, "both")]
    title = f"Initial and final selections: {run.title}, b {run.log.bank.shape[1]}, h {h}"
    return draw_cells(panels, colours, title, OVERLAP_ROWS, columns=1, vectors=OVERLAP_VECTORS)


def figure5(source: Source) -> Figure:
    """The footprints by groups of epochs."""
    [run] = source.runs(TABLE_1, [METHOD])
    panels = {}
    for group in epoch_groups(run.epochs):
        ever = footprint(run.log.footprints[group])
        first, last = group[0] + 1, group[-1] + 1
        name = f"epoch {first}" if first == last else f"epochs {first} to {last}"
        panels[f"{name}: {ever.mean():.1%}"] = ever.astype(int)
    title = f"Selection footprints by epoch: {run.title}"
    states = [(BLUE, "selected after some step of these epochs")]
    return draw_cells(panels, states, title, FOOTPRINT_ROWS, columns=3 if len(panels) in (3, 5, 6) else 2)


def figure6(source: Source) -> Figure:
    """The vectors' weights by depth."""
    [run] = source.runs(TABLE_1, [METHOD])
    depths = dict(zip(THIRDS, sums_by(run.log, thirds(run.log), THIRDS), strict=True))
    return draw_sums([depths], f"Weight of each bank vector by depth: {run.title}")


def figure7(source: Source) -> Figure:
    """The vectors' weights by module and by factor."""
    [run] = source.runs(TABLE_1, [METHOD])
    modules = [layer.split(".")[-1] for layer, _ in per_row(run.log)]
    factors = [factor for _, factor in per_row(run.log)]
    columns = [dict(zip(names, sums_by(run.log, modules, names), strict=True)) for names in [sorted(set(modules))]] + [
        dict(zip(("factor A", "factor B"), sums_by(run.log, factors, ("A", "B")), strict=True))
    ]
    return draw_sums(columns, f"Weight of each bank vector by module and by factor: {run.title}")


def figure8(source: Source) -> Figure:
    """How evenly the vectors are used."""
    [run] = source.runs(TABLE_1, [METHOD])
    counts = usage(run.log.indices[-1], run.log.num_vectors)
    return draw_usage(counts, len(run.log.indices[-1]), f"Use of the bank after training: {run.title}")


def figure9(source: Source) -> Figure:
    """The bank in the plane."""
    [run] = source.runs(TABLE_1, [METHOD])
    points, perplexity = plane(run.log.bank)
    title = f"t-SNE of the bank (perplexity {perplexity:.0f}): {run.title}"
    return draw_plane(points, run.log.indices[-1], run.log.weights[-1], title)


FIGURES: dict[int, Callable[[Source], Figure]] = {
    1: figure1,
    3: figure3,
    4: figure4,
    5: figure5,
    6: figure6,
    7: figure7,
    8: figure8,
    9: figure9,
}


# What is shown, as arrays. N sub-vectors, h vectors, k of them in each mixture.


def footprint(footprints: np.ndarray) -> np.ndarray:
    """(E, N, h) -> (N, h): selected at some step of any of these epochs."""
    return np.any(footprints, axis=0)


def selected(indices: np.ndarray, num_vectors: int) -> np.ndarray:
    """(N, k) -> (N, h) of booleans: which vectors each sub-vector selects."""
    mask = np.zeros((len(indices), num_vectors), dtype=bool)
    np.put_along_axis(mask, indices, True, axis=1)
    return mask


def overlap(initial: np.ndarray, final: np.ndarray) -> np.ndarray:
    """Two (N, h) of booleans -> (N, h): 0 in neither, 1 in the initial only, 2 in the final only, 3 in both."""
    return initial + 2 * final.astype(int)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` positions, from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def epoch_groups(epochs: int) -> list[np.ndarray]:
    """The epochs 0... in groups that follow each other: 4 to 6 equal ones if that can be, else nearly equal ones."""
    if epochs <= 6:
        return np.array_split(np.arange(epochs), epochs)
    groups = next((g for g in (6, 5, 4) if epochs % g == 0), 4)
    return np.array_split(np.arange(epochs), groups)


def weight_sums(indices: np.ndarray, weights: np.ndarray, num_vectors: int) -> np.ndarray:
    """(N, k), (N, k) -> (h,): the weight that each vector has in all mixtures together; adds up to N."""
    return np.bincount(indices.ravel(), weights.ravel(), minlength=num_vectors)


def usage(indices: np.ndarray, num_vectors: int) -> np.ndarray:
    """(N, k) -> (h,): how many sub-vectors select each vector."""
    return np.bincount(indices.ravel(), minlength=num_vectors)


def per_row(log: Selections) -> list[tuple[str, str]]:
    """The layer and the factor ("A" or "B") of each of the N sub-vectors."""
    return [(layer, factor) for layer, factor, rows in log.factors for _ in range(rows)]


def thirds(log: Selections) -> list[str]:
    """Which of THIRDS of the encoder's depth each of the N sub-vectors is in, by the block number in its layer's name.

    Raises:
        ValueError: a layer's name has no number.
    """
    blocks = []
    for layer, _ in per_row(log):
        number = re.search(r"\.(\d+)\.", layer)
        if number is None:
            raise ValueError(f"no block number in the layer's name {layer}")
        blocks.append(int(number[1]))
    return [THIRDS[3 * block // (max(blocks) + 1)] for block in blocks]


def sums_by(log: Selections, labels: Sequence[str], names: Sequence[str]) -> list[np.ndarray]:
    """The (h,) weight sums after the last epoch, of the sub-vectors with each of these labels; N labels."""
    indices, weights, of_row = log.indices[-1], log.weights[-1], np.array(labels)
    return [weight_sums(indices[of_row == name], weights[of_row == name], log.num_vectors) for name in names]


def plane(bank: np.ndarray) -> tuple[np.ndarray, float]:
    """The (h, b) bank as (h, 2) points of t-SNE, and its perplexity."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(bank) - 1) / 3)
    return TSNE(perplexity=perplexity, random_state=0).fit_transform(bank), perplexity


def mixtures(points: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(h, 2), (N, k), (N, k) -> (N, 2): each sub-vector between the points of its vectors, by their weights."""
    shares = weights / weights.sum(axis=1, keepdims=True)
    return (shares[:, :, None] * points[indices]).sum(axis=1)


class Point(NamedTuple):
    """One method of Figure 1 (or of sizes.py); the score and its standard deviation in percent."""

    label: str
    size: float
    score: float
    deviation: float | None
    is_vblora: bool

    @classmethod
    def of(cls, method: str, parameters: float, score: float, deviation: float | None) -> Point:
        return cls(table.method_title(method), parameters, score, deviation, method.startswith("vblora"))


# How it is drawn.


def draw_scores(
    panels: dict[str, list[Point]], ylabel: str, xlabel: str = "stored parameters, without the head"
) -> Figure:
    """Scores against sizes, a panel for each title."""
    figure = Figure(figsize=(12, 5.6), dpi=DPI, layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        for p in points:
            colour, marker = (VERMILION, "D") if p.is_vblora else (BLUE, "o")
            axes.plot(p.size, p.score, marker, color=colour, markersize=8, zorder=3)
            if p.deviation is not None:
                axes.errorbar(p.size, p.score, p.deviation, color=colour, capsize=3, linewidth=1.2, alpha=0.5)
        axes.set_xscale("log")
        axes.margins(0.16, 0.14)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
    if any(p.deviation is not None for points in panels.values() for p in points):
        figure.supxlabel("bars: standard deviation over seeds", fontsize=12, color=GREY)
    figure.draw_without_rendering()  # lays the panels out: only then is it known which labels would overlap
    for axes, points in zip(figure.axes, panels.values(), strict=True):
        _label(axes, points)
    return figure


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's label near it, where it covers neither a label nor a point nor a bar if there is such a place.

    All in pixels. A label that is not beside its point gets a line to it.
    """
    marks, parts = [], []
    for p in points:
        d = p.deviation or 0.0
        marks.append(axes.transData.transform((p.size, p.score)))
        parts.append(axes.transData.transform([(p.size, p.score + d * t) for t in np.linspace(-1, 1, 21)]))
    bars = np.concatenate(parts)
    turns = np.deg2rad([0, 180, 90, 270, 45, 315, 135, 225, 22, 338, 158, 202])
    taken: list[Bbox] = []
    for p, (x, y) in zip(points, marks, strict=True):
        colour = VERMILION if p.is_vblora else BLACK
        text = axes.annotate(
            p.label,
            (p.size, p.score),
            (0, 0),
            textcoords="offset pixels",
            ha="center",
            va="center",
            fontsize=12,
            color=colour,
            zorder=4,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkB": 6},
        )
        text.set_path_effects([Stroke(linewidth=3, foreground=WHITE), Normal()])
        box = text.get_window_extent()
        width, height = box.width, box.height

        def faults(dx: float, dy: float, x: float = x, y: float = y, w: float = width, h: float = height) -> int:
            box = Bbox.from_bounds(x + dx - w / 2 - 3, y + dy - h / 2 - 2, w + 6, h + 4)
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            covered = sum(box.padded(6).contains(*mark) for mark in marks)
            return (
                100 * (not inside)
                + 10 * (box.count_overlaps(taken) + covered)
                + int(((bars > box.min) & (bars < box.max)).all(axis=1).sum())
            )

        places = [
            (np.cos(turn) * (gap + width / 2), np.sin(turn) * (gap + height / 2))
            for gap in (16, 30, 50, 80, 110)
            for turn in turns
        ]
        line = text.arrow_patch
        assert line is not None
        dx, dy = min(places, key=lambda place: faults(*place))  # the first, so the nearest, of the best
        text.set_position((dx, dy))
        is_beside = np.hypot(max(abs(dx) - width / 2, 0), max(abs(dy) - height / 2, 0)) < 20
        if is_beside or abs(dx) < 1:  # right above or below, a line would hide the bar
            line.set_visible(False)
        taken.append(Bbox.from_bounds(x + dx - width / 2 - 2, y + dy - height / 2 - 1, width + 4, height + 2))


def draw_cells(
    panels: dict[str, np.ndarray],
    states: Sequence[tuple[str, str]],
    title: str,
    most: int,
    columns: int,
    vectors: int | None = None,
) -> Figure:
    """Maps of sub-vectors (across) and bank vectors (upwards).

    Args:
        panels: by title, (N, h) of 0 (blank), 1 (the first of `states`), 2, ...
        states: colour and legend of each.
        title: of the figure.
        most: sub-vectors to show, evenly spaced over all N.
        columns: panels beside each other.
        vectors: bank vectors to show, from the first; all unless given.
    """
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(12, 8 if rows > 1 else 5.6), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colours = ListedColormap([WHITE, *(colour for colour, _ in states)])
    for axes, (name, cells) in zip(grid.flat, panels.items(), strict=False):
        shown = cells[evenly_spaced(len(cells), most), :vectors]
        axes.imshow(
            shown.T,
            cmap=colours,
            vmin=-0.5,
            vmax=len(states) + 0.5,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
        )
        axes.set_title(name)
        axes.set_xlabel("sub-vector")
        axes.set_ylabel("vector of the bank")
        axes.label_outer()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for j in range(len(panels) - columns * (rows - 1), columns):  # nothing below: the panel above gets the labels
        grid[-1, j].remove()
        grid[-2, j].set_xlabel("sub-vector")
        grid[-2, j].tick_params(labelbottom=True)
    n, h = next(iter(panels.values())).shape
    parts = [f"{most} of {n} sub-vectors, evenly spaced"] if n > most else []
    if vectors is not None and vectors < h:
        parts.append(f"the first {vectors} of {h} vectors")
    figure.suptitle(f"{title}\nshown: {', '.join(parts)}; percentages are of all" if parts else title)
    handles = [Patch(facecolor=colour, edgecolor=GREY, label=label) for colour, label in states]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(states), frameon=False)
    return figure


def draw_sums(columns: Sequence[dict[str, np.ndarray]], title: str) -> Figure:
    """Bars of (h,) weight sums: a panel for each name, those of one dictionary below each other."""
    rows = max(map(len, columns))
    figure = Figure(figsize=(12, 7.5 if rows > 2 else 6.5), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, len(columns), sharex=True, sharey=True, squeeze=False)
    colours = iter((BLUE, ORANGE, GREEN, VERMILION))
    for j, column in enumerate(columns):
        for i, (name, sums) in enumerate(column.items()):
            axes = grid[i, j]
            axes.bar(np.arange(len(sums)), sums, width=0.85, color=next(colours))
            used = np.count_nonzero(sums)
            axes.set_title(f"{name}: {sums.sum():.0f} sub-vectors, {used} of {len(sums)} vectors")
            axes.margins(x=0.01)
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
        for axes in grid[len(column) :, j]:
            axes.remove()
    figure.supxlabel("vector of the bank", fontsize=13)
    figure.supylabel("sum of top-k weights (in sub-vectors)", fontsize=13)
    figure.suptitle(title)
    return figure


def draw_usage(counts: np.ndarray, subvectors: int, title: str) -> Figure:
    """A histogram of the (h,) numbers of sub-vectors that use each vector."""
    width = max(1, -(-(int(counts.max()) + 1) // 40))
    bins = np.arange(-0.5, counts.max() + width + 0.5, width)
    figure = Figure(figsize=(11, 5.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    label = "vectors" if width == 1 else f"vectors, in bins of {width}"
    axes.hist(counts, bins=list(bins), color=BLUE, edgecolor=WHITE, label=label)
    axes.axvline(counts.mean(), color=VERMILION, linestyle="--", linewidth=2, label=f"mean: {counts.mean():.1f}")
    axes.set_title(f"{title}\n{np.count_nonzero(counts)} of {len(counts)} vectors are used")
    axes.set(xlabel=f"sub-vectors that use the vector (of {subvectors})", ylabel="number of vectors")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.legend()
    return figure


def draw_plane(points: np.ndarray, indices: np.ndarray, weights: np.ndarray, title: str) -> Figure:
    """The bank's (h, 2) points, and the N sub-vectors between those that they mix."""
    figure = Figure(figsize=(11, 8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    mixed = mixtures(points, indices, weights)
    lines = [(mixed[i], points[j]) for i, row in enumerate(indices) for j in row]
    axes.add_collection(
        LineCollection(lines, colors=GREY, linewidths=0.6, alpha=min(0.35, 150 / len(indices)), zorder=1)
    )
    axes.scatter(
        mixed[:, 0],
        mixed[:, 1],
        s=12,
        color=ORANGE,
        zorder=2,
        label=f"sub-vectors ({len(mixed)}), between the vectors that they mix",
    )
    used = usage(indices, len(points)) > 0
    axes.scatter(points[used, 0], points[used, 1], s=50, color=BLUE, zorder=3, label=f"vectors in use ({used.sum()})")
    if not used.all():
        rest = f"vectors not in use ({(~used).sum()})"
        axes.scatter(points[~used, 0], points[~used, 1], s=50, facecolors=WHITE, edgecolors=BLUE, zorder=3, label=rest)
    axes.set(title=title, xlabel="t-SNE dimension 1 (no unit)", ylabel="t-SNE dimension 2 (no unit)")
    # Below the axes, as there is no empty corner to rely on.
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def counted(count: float, what: str) -> str:
    return f"{count:g} {what}" if count == 1 else f"{count:g} {what}s"


if __name__ == "__main__":
    commands.run(main, "figures")
