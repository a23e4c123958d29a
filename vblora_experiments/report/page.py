"""The page: tables with the paper's values beside, pictures, and below every record with its command."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from vblora.io import replacing
from vblora_experiments import records
from vblora_experiments.report import charts
from vblora_experiments.report.found import PARAMETERS, Found, Line, Run, Table
from vblora_experiments.selection_log import read_log

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).with_name("page.html")
Cells = Sequence[tuple[str, bool]]  # a text, and whether it leads to the line's records


class Shown(NamedTuple):
    """A table as the page has it."""

    table: Table
    header: Sequence[str]
    rows: Sequence[tuple[Line, Cells]]
    statistic: str
    charts: Sequence[tuple[str, Markup]]
    legend: Sequence[tuple[str, str, Line]]
    selections: Sequence[Mapping[str, Any]]


def write(found: Found, folders: Sequence[Path], path: Path, watch: Callable[[list[Table]], Any] = iter) -> None:
    """Write the page, in one step. A log of selections that cannot be read is added to the problems.

    Args:
        found: what is shown.
        folders: where it was found, for the heading.
        path: of the page. Its links to files begin at its folder.
        watch: what the tables go through, such as a progress bar.
    """
    with charts.drawing():
        shown = [_shown(table, path, found.problems) for table in watch(found.tables)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["place"] = _place
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        found=found,
        folders=folders,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        commit=records.commit(),
        sections=_sections(shown),
        readmes=_readmes(shown, path),
        others=[(other, _link(other.file, path)) for other in found.others],
        records=[
            {"table": one.table, "line": line, "runs": _runs(one.table, line, path)} for one, line in _lines(shown)
        ],
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sections(shown: Sequence[Shown]) -> list[tuple[str, Path, list[Shown]]]:
    """A place in the page for each folder, with its tables."""
    folders = list(dict.fromkeys(one.table.folder for one in shown))
    return [(f"folder{at}", f, [one for one in shown if one.table.folder == f]) for at, f in enumerate(folders)]


def _readmes(shown: Sequence[Shown], page: Path) -> dict[str, str]:
    """The link to each folder's README, "" where there is none."""
    files = {place: folder / "README.md" for place, folder, _ in _sections(shown)}
    return {place: _link(file, page) if file.is_file() else "" for place, file in files.items()}


def _lines(shown: Sequence[Shown]) -> list[tuple[Shown, Line]]:
    return [(one, line) for one in shown for line in one.table.lines]


def _place(path: Path) -> str:
    """A path as it is shown: within the checkout from its folder on."""
    absolute = path.resolve()
    return str(absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else path)


def _link(file: Path, page: Path) -> str:
    """The way from the page to a file."""
    relative = os.path.relpath(file.resolve(), page.resolve().parent)
    return quote(relative if relative.startswith("..") else f"./{relative}")


def _shown(table: Table, page: Path, problems: list[str]) -> Shown:
    header, rows = _cells(table)
    middles = {"median" if line.is_median else "mean" for line in table.lines}
    many = any(len(line.runs) > 1 for line in table.lines)
    pictures = [("By " + _over(table), charts.curves(table)), ("Score against bytes", charts.sizes(table))]
    drawn = [(caption, Markup(svg)) for caption, svg in pictures if svg is not None]
    return Shown(
        table,
        header,
        rows,
        f"The {' or '.join(sorted(middles))} over seeds." if many else "One seed.",
        drawn,
        charts.legend(table) if drawn else (),
        list(_selections(table, page, problems)),
    )


def _over(table: Table) -> str:
    """What the curves of a table go over."""
    curve = next((run.curve for line in table.lines for run in line.runs if run.curve is not None), None)
    return curve.x if curve is not None else "epoch"


def _cells(table: Table) -> tuple[list[str], list[tuple[Line, Cells]]]:
    """The header and a row for each line; columns of the paper's where it has any."""
    papers = {name for line in table.lines for name in line.paper}
    header = ["method and settings"]
    for score in table.scores:
        header += [score, *(["paper", "difference"] if score in papers else [])]
    header += ["seeds", "stored numbers", *(["paper"] if PARAMETERS in papers else []), "bytes"]
    rows: list[tuple[Line, Cells]] = []
    for line in table.lines:
        cells = [cell for score in table.scores for cell in _score_cells(line, score, score in papers)]
        cells += [(str(len(line.runs)), True), (f"{line.stored['parameters']:,}", True)]
        if PARAMETERS in papers:
            cells.append((_count(line.paper.get(PARAMETERS)), False))
        rows.append((line, [*cells, (f"{line.stored['bytes']:,}", True)]))
    return header, rows


def _score_cells(line: Line, score: str, with_paper: bool) -> Cells:
    """A score with its deviation, and where the table has them the paper's and the difference."""
    middle, deviation, printed = line.middle(score), line.deviation(score), line.paper.get(score)
    text = "" if middle is None else _number(middle) + ("" if deviation is None else f" ± {_number(deviation)}")
    if not with_paper:
        return [(text, True)]
    differs = "" if middle is None or printed is None else f"{middle - printed:+.2f}"
    return [(text, True), ("" if printed is None else _number(printed), False), (differs, True)]


def _number(value: float) -> str:
    return f"{value:.2f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _runs(table: Table, line: Line, page: Path) -> list[tuple[Run, str, list[str]]]:
    """Each run with the link to its file, and what stands beside it."""
    rows = []
    for run in line.runs:
        stored, record = run.record["stored_parameters"], run.record
        scores = [_number(run.scores[name]) if name in run.scores else "" for name in table.scores]
        seconds = record.get("train_seconds")
        cells = [str(run.seed), *scores, f"{stored['parameters']:,}", f"{stored['bytes']:,}"]
        cells += [
            "" if seconds is None else f"{seconds:,.0f}",
            str(record.get("date", "")),
            str(record.get("commit", "")),
        ]
        rows.append((run, _link(run.file, page), cells))
    return rows


def _selections(table: Table, page: Path, problems: list[str]) -> Any:
    """The logs of what a table's runs selected."""
    for line in table.lines:
        for run in line.runs:
            path = run.selections
            if path is None:
                continue
            try:
                log = read_log(path)
            except ValueError as error:
                problems.append(" ".join(str(error).split()))
                continue
            steps = run.record.get("steps")
            found = charts.statistics_of(log, steps if isinstance(steps, int) else len(log.changes))
            shares = [found.in_use[0], found.in_use[-1], found.ever, found.entropy[0], found.entropy[-1]]
            changes = [f"{value:.2%}" for value in (found.changes[0], found.changes[-1])]
            yield {
                "name": f"{line.name}, seed {run.seed}",
                "at": line.at,
                "link": _link(path, page),
                "numbers": [*(f"{share:.3f}" for share in shares), *changes],
                "svg": Markup(charts.selection(log, found)),
            }
