"""One HTML page from records: tables with the paper's values beside, learning curves, score against bytes, selections.

    ./scripts/report.sh                                        # of results/, into runs/report.html
    ./scripts/report.sh runs/glue results/glue_minilm --output /tmp/page.html

Of a folder all records below it are taken; of a run's own folder its record.json and its log of selections. Each number
of the page leads to its records, and those to their files and commands. The page needs no network and has no script.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("NLU", "NLG", "instruction_tuning", "math_instruction_tuning")]

import e2e_paper  # noqa: E402
import instruct_paper  # noqa: E402
import math_paper  # noqa: E402
import paper  # noqa: E402
from experiments import ABLATIONS, trial_of  # noqa: E402
from vblora_experiments import bars, commands  # noqa: E402
from vblora_experiments.report import found, page  # noqa: E402
from vblora_experiments.report.kinds import KINDS, MATHEMATICS  # noqa: E402

RESULTS = ROOT / "results"
OUTPUT = ROOT / "runs" / "report.html"
Record = Mapping[str, Any]


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    everything = found.read(options.records, PAPERS, lambda files: bars.bar(files, "reading"))
    page.write(everything, options.records, options.output, lambda tables: bars.bar(tables, "drawing"))
    for problem in everything.problems:
        print(f"report: not shown: {problem}", file=sys.stderr)
    size = options.output.stat().st_size
    print(f"{options.output}: {len(everything.runs)} runs, {len(everything.tables)} tables, {size:,} bytes")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="report.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="*", type=Path, default=[RESULTS], help="files and folders; results/")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the page; runs/report.html unless given")
    options = commands.one_line_errors(parser).parse_args(arguments)
    if options.output.suffix not in (".html", ".htm"):
        raise ValueError(f"--output {options.output}: its name must end with .html")
    return options


def glue(record: Record) -> dict[str, float]:
    """Tables 1, 5 and 6, which print each run's best epoch."""
    best = next(iter(KINDS["glue"].scores(record)))
    model, task, method = _parts(record, 3)
    values = {best: _printed(record, model, task, method), found.PARAMETERS: None}
    if millions := paper.PARAMETERS.get((model, method)):
        values[found.PARAMETERS] = 1e6 * millions
    return {name: value for name, value in values.items() if value is not None}


def _printed(record: Record, model: str, task: str, method: str) -> float | None:
    if not record.get("overrides"):
        return paper.score(model, method, task)
    for study in ABLATIONS.values():
        if (model, task, method) == (study.model, study.task, study.method):
            for name, changes in study.of(model).items():
                if trial_of(record["row"], name, changes, record["seed"]).is_of(record):
                    return study.paper.get(name)
    return None


def e2e(record: Record) -> dict[str, float]:
    model, method = _parts(record, 2)
    printed = e2e_paper.TABLE_2.get((model, method), ())
    values = dict(zip((name.replace("_", "-") for name in e2e_paper.SCORES), printed, strict=False))
    return values | _parameters(e2e_paper.PARAMETERS, model, method)


def instruct(record: Record) -> dict[str, float]:
    """Table 3 prints the first turn, by whichever judge."""
    model, method = _parts(record, 2)
    printed = instruct_paper.TABLE_3.get((model, method))
    judged = {} if printed is None else {f"turn 1, {judge}": printed for judge in record["scores"]}
    return judged | _parameters(instruct_paper.PARAMETERS, model, method)


def mathematics(record: Record) -> dict[str, float]:
    """Table 4, by the authors' rule."""
    model, method = _parts(record, 2)
    printed = math_paper.TABLE_4.get((model, method), ())
    values = {MATHEMATICS[name]: value for name, value in zip(math_paper.SETS, printed, strict=False)}
    return values | _parameters(math_paper.PARAMETERS, model, method)


def _parts(record: Record, count: int) -> list[str]:
    """The parts of the record's row; empty ones where it has none."""
    parts = str(record.get("row") or "").split("/")
    return parts if len(parts) == count else [""] * count


def _parameters(known: Mapping[tuple[str, str], float], model: str, method: str) -> dict[str, float]:
    millions = known.get((model, method))
    return {} if millions is None else {found.PARAMETERS: 1e6 * millions}


PAPERS: found.Papers = {"glue": glue, "e2e": e2e, "instruct": instruct, "math": mathematics}

if __name__ == "__main__":
    commands.run(main, "report")
