"""Score outputs as the official script of the E2E challenge does (measure_scores.py -p).

    python NLG/score.py OUTPUTS REFERENCES [--json FILE]

OUTPUTS has one output per line. REFERENCES, in the order of the outputs, is one of

    *.csv           E2E's own form, with columns mr and ref: one group per mr, in order of first appearance
    *.jsonl         one {"references": ["...", "..."]} per line
    anything else   one reference per line, groups separated by one blank line; with no blank line and as many lines as
                    outputs, one reference for each

METEOR, ROUGE-L and CIDEr need Java and pycocoevalcap; without, they are left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import e2e_scores
from vblora_experiments import commands, text_files


def main(arguments: list[str]) -> dict[str, Any]:
    """Score, print, and return what --json writes."""
    parser = argparse.ArgumentParser(prog="score", description="Scores of the E2E challenge.")
    parser.add_argument("outputs", type=Path, metavar="OUTPUTS", help="one output per line")
    parser.add_argument(
        "references", type=Path, metavar="REFERENCES", help="groups with blank lines between, or .csv, or .jsonl"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores, unrounded, to this file")
    chosen = parser.parse_args(arguments)
    if chosen.json is not None and chosen.json.is_dir():
        raise ValueError(f"--json {chosen.json}: is a folder, not a file")

    outputs = read_outputs(chosen.outputs)
    references = read_references(chosen.references, len(outputs))
    empty = sum(not output for output in outputs)
    if len(outputs) != len(references):
        raise ValueError(
            f"{chosen.outputs} has {len(outputs)} outputs{f' ({empty} of them empty)' if empty else ''} and "
            f"{chosen.references} has {len(references)} groups of references: each output needs one group"
        )
    if empty:
        print(f"score: warning: {empty} of {len(outputs)} outputs are empty, and count as such", file=sys.stderr)
    scores = e2e_scores.score(outputs, references)
    print("SCORES:\n==============")
    for name in e2e_scores.NAMES:
        value = scores[name]
        print(f"{name}: {'not computed' if value is None else f'{value:.4f}'}")
    print()
    result = {
        "scores": scores,
        "outputs": len(outputs),
        "empty_outputs": empty,
        "references": sum(len(group) for group in references),
    }
    if chosen.json is not None:
        from vblora.io import write_json  # imports torch

        write_json(chosen.json, result)
    return result


def read_outputs(path: Path) -> list[str]:
    """The lines of a file, without white space around; empty ones too."""
    lines = _lines(path)
    if not lines:
        raise ValueError(f"{path}: no outputs")
    return lines


def read_references(path: Path, num_outputs: int) -> list[list[str]]:
    """The groups of references in a file, in any of this script's forms.

    ``num_outputs`` decides only what a file with no blank line is: one group, or one reference for each output.
    """
    if path.suffix.lower() == ".csv":
        groups = _from_csv(path)
    elif path.suffix.lower() == ".jsonl":
        groups = _from_json_lines(path)
    else:
        groups = _from_text(path)
        if len(groups) == 1 and len(groups[0]) == num_outputs:
            groups = [[reference] for reference in groups[0]]
    if not groups:
        raise ValueError(f"{path}: no references")
    return groups


def _from_text(path: Path) -> list[list[str]]:
    groups: list[list[str]] = []
    lines = _lines(path)
    while lines and not lines[-1]:
        lines.pop()
    after_blank = True
    for number, line in enumerate(lines, 1):
        if line and after_blank:
            groups.append([line])
        elif line:
            groups[-1].append(line)
        elif after_blank:
            raise ValueError(f"{path}, line {number}: a blank line with no references before it, an empty group")
        after_blank = not line
    return groups


def _from_csv(path: Path) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    header: list[str] = []
    for number, fields in text_files.read_table(path):
        if not header:
            header = [name.strip().lower() for name in fields]
            text_files.check_header(path, header)
            if not {"mr", "ref"} <= set(header):
                raise ValueError(f"{path}: needs the columns mr and ref; found {', '.join(header)}")
            continue
        # The official script takes one quotation mark at the start of a reference for the file's and drops it. Two
        # references of E2E's test set begin with a mark of their own.
        reference = re.sub(r"^['\"]\s*", "", fields[header.index("ref")].strip())
        if not reference:
            raise ValueError(f"{path}, line {number}: an empty reference")
        groups.setdefault(fields[header.index("mr")].strip(), []).append(reference)
    if not header:
        raise ValueError(f"{path}: needs the columns mr and ref; found none")
    return list(groups.values())


def _from_json_lines(path: Path) -> list[list[str]]:
    groups = []
    for where, record in text_files.read_json_rows(path, as_lines=True):
        group = record.get("references")
        if not isinstance(group, list) or not all(isinstance(reference, str) for reference in group):
            raise ValueError(f'{where}: not of the form {{"references": ["...", "..."]}}')
        if not group:
            raise ValueError(f"{where}: an empty group of references")
        groups.append([reference.strip() for reference in group])
    return groups


def _lines(path: Path) -> list[str]:
    """The lines of a file, whatever system wrote it, without white space around.

    Not splitlines(): it also cuts at characters such as U+2028, which an output may hold.
    """
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text_files.read_text(path))]
    return lines if lines[-1] else lines[:-1]  # the last line may end with a newline or without


if __name__ == "__main__":
    commands.run(main, "score")
