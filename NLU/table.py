"""Run records as a table in Markdown.

    python NLU/table.py results/cola_minilm

Takes folders or record files; one row per record, most stored parameters first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vblora.storage.files import read_json
from vblora.training import commands

TITLES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "vblora": "VB-LoRA",
    "tied_lora": "Tied-LoRA",
    "lora_xs": "LoRA-XS",
}
METRICS = {"matthews_correlation": "Matthews", "accuracy": "accuracy", "pearson": "Pearson"}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, help="record files, or folders of them")
    print(render(read(parser.parse_args(arguments).records)))


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """The records in these files and folders.

    Raises:
        ValueError: there are none.
    """
    files = [f for path in paths for f in (_record_files(path) if path.is_dir() else [path])]
    records = [record for record in map(read_json, files) if record.get("experiment") == "glue"]
    if not records:
        raise ValueError(f"no run record in {', '.join(map(str, paths))}")
    return sorted(records, key=lambda r: -r["stored_parameters"]["parameters"])


def _record_files(folder: Path) -> list[Path]:
    """The JSON files of a folder of results, and the records of the runs below it."""
    return sorted({*folder.glob("*.json"), *folder.rglob("record.json")})


def render(records: list[dict[str, Any]]) -> str:
    """The Markdown table."""
    lines = [
        "| task | method | stored parameters | adapter bytes | last epoch | best epoch | epochs |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        stored, scores = record["stored_parameters"], record["scores"]
        metric = scores["metric"]
        lines.append(
            f"| {record['task']} ({METRICS[metric]}) | {TITLES.get(record['method'], record['method'])} "
            f"| {stored['parameters']:,} | {stored['bytes']:,} | {scores['last'][metric]:.3f} "
            f"| {scores['best'][metric]:.3f} | {scores['last']['epoch']:g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    commands.run(main, "table")
