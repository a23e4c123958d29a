"""FLEURS from the hub as a local folder: Google's data set is a script there, which `datasets` 4 and later refuse, but
the hub keeps a branch of it in Parquet files.

    python ASR/fleurs_parquet.py it_it DATA/it_it                  # about 2 GB; one language of FLEURS's 102
    python ASR/fleurs_parquet.py it_it DATA/it_it --files PARQUET  # from PARQUET/train/*.parquet, validation/ and test/

DIR receives train.tsv, dev.tsv and test.tsv in FLEURS's own form and the recordings in audio/train/, audio/dev/ and
audio/test/, as its archives have them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speech_data import FLEURS_COLUMNS
from vblora.hub import from_hub
from vblora.io import new_directory
from vblora_experiments import commands

HUB = "google/fleurs"
BRANCH = f"hf://datasets/{HUB}@refs/convert/parquet"
PARTS = {"train": "train", "dev": "validation", "test": "test"}  # the hub's names by those of the archives
COLUMNS = ("id", "num_samples", "audio", "transcription", "raw_transcription", "gender")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language", help="as FLEURS calls it, such as it_it or ast_es")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--files", type=Path, help="folder with the language's Parquet files, not the hub")
    options = parser.parse_args(arguments)
    counts = write(options.language, options.folder, options.files)
    print(f"{options.folder}: {', '.join(f'{part} {count}' for part, count in counts.items())}")


def write(language: str, folder: Path, files: Path | None = None) -> dict[str, int]:
    """Write the tables and the recordings of a language; the rows of each part.

    Raises:
        ValueError: the folder exists, the files cannot be had, or they are no FLEURS.
    """
    counts = {}
    with new_directory(folder) as new:
        for part in PARTS:
            place = new / "audio" / part
            place.mkdir(parents=True)
            rows = [_written(row, place) for row in rows_of(language, part, files)]
            (new / f"{part}.tsv").write_text("".join(rows), encoding="utf-8")
            counts[part] = len(rows)
    return counts


def rows_of(language: str, part: str, files: Path | None) -> Iterator[dict[str, Any]]:
    """The rows of a part as the Parquet files have them, one after the other; recordings are not decoded.

    Raises:
        ValueError: the files cannot be had, or lack a column.
    """
    import datasets

    pattern = f"{BRANCH}/{language}" if files is None else str(files)
    pattern = f"{pattern}/{PARTS[part]}/*.parquet"
    rows = from_hub(
        lambda: datasets.load_dataset("parquet", data_files=pattern, split="train", streaming=True),
        f"{HUB} {language}" if files is None else pattern,
        "--files DIR, or FLEURS's archive",
    )
    if missing := [name for name in COLUMNS if name not in (rows.column_names or [])]:
        raise ValueError(f"{pattern}: no column {', '.join(missing)}: these are no files of FLEURS")
    yield from rows.cast_column("audio", datasets.Audio(decode=False))


def _written(row: dict[str, Any], folder: Path) -> str:
    """Write a row's recording; its line in the table.

    Raises:
        ValueError: the recording is missing or a second one of its name.
    """
    sound, text = row["audio"], " ".join(row["transcription"].split())
    name = Path(sound["path"] or "").name
    if not name or sound["bytes"] is None:
        raise ValueError(f"FLEURS, {folder.name}, id {row['id']}: the row has no recording")
    if (folder / name).exists():
        raise ValueError(f"FLEURS, {folder.name}, id {row['id']}: {name} a second time")
    (folder / name).write_bytes(sound["bytes"])
    spelled = " ".join(text.replace(" ", "|"))
    written = " ".join(row["raw_transcription"].split())
    fields = (row["id"], name, written, text, spelled, row["num_samples"], row["gender"])
    assert len(fields) == FLEURS_COLUMNS
    return "\t".join(map(str, fields)) + "\n"


if __name__ == "__main__":
    commands.run(main, "fleurs_parquet")
