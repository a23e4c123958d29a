"""Tables of text, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

FORMATS = ("markdown", "csv", "latex")
Lines = list[list[str]]
WORDS = ("model", "method", "task", "unseen task", "variant", "adapter", "")  # the columns that are not numbers


def render(header: Sequence[str], lines: Lines, format: str, notes: Sequence[str] = ()) -> str:
    """The table as Markdown or LaTeX, and its notes below."""
    text = _markdown(header, lines) if format == "markdown" else _latex(header, lines)
    comment = "% " if format == "latex" else ""
    return "\n".join([text, *(f"\n{comment}{note}" for note in notes)])


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The rows as CSV; floats to six digits, None as nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in row])
    return text.getvalue().rstrip("\n")


def count(parameters: int | None) -> str:
    """A number of parameters in millions."""
    return "" if parameters is None else f"{parameters / 1e6:.3f}M"


def number(value: float | None, sd: float | None = None, digits: int = 1) -> str:
    """A score and its standard deviation; "" for none."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")


def mean_of(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return mean(values) if values else None


def deviation_of(values: Sequence[float]) -> float | None:
    """The standard deviation; None of fewer than two values."""
    return stdev(values) if len(values) > 1 else None


def difference(value: float | None, printed: float | None) -> float | None:
    """What was found less what the paper prints; None where one of them is missing."""
    return None if value is None or printed is None else value - printed


def signed(value: float | None, digits: int = 1) -> str:
    """A difference; "" for none."""
    return "" if value is None else f"{value:+.{digits}f}"


def _markdown(header: Sequence[str], lines: Lines) -> str:
    ends = ["---" if title in WORDS else "---:" for title in header]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ends, *lines])


def _latex(header: Sequence[str], lines: Lines) -> str:
    def line(parts: Sequence[str]) -> str:
        text = " & ".join(parts)
        for plain, command in (("#", r"\#"), ("_", r"\_"), ("±", r"$\pm$"), ("†", r"$^\dagger$")):
            text = text.replace(plain, command)
        return text + r" \\"

    rules = [r"\begin{tabular}{" + "l" * len(header) + "}", r"\toprule", line(header), r"\midrule"]
    return "\n".join([*rules, *map(line, lines), r"\bottomrule", r"\end{tabular}"])
