"""Files of rows that others wrote: tables and JSON. What is wrong is one line that names the file and the place."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

csv.field_size_limit(2**31 - 1)  # Python's own limit of 131,072 characters is below what a text may have


def read_text(path: Path) -> str:
    """A file of UTF-8 text, with a byte order mark or without.

    Raises:
        ValueError: there is no such file, or it is not UTF-8.
    """
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder, not a file") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from None


def read_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a table that are not empty, each with its number in the file: the header is the first.

    A .tsv file has tabs between fields and no quoting, any other file commas and quotation marks.

    Raises:
        ValueError: as `read_text`; or it is no such table, or a line has another number of fields than the first.
    """
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(
        io.StringIO(read_text(path), newline=""), **(tabs if path.suffix == ".tsv" else {"strict": True})
    )
    header: list[str] = []
    try:
        for fields in filter(None, reader):
            header = header or fields
            if len(fields) != len(header):
                names = ", ".join(header)
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(fields)} columns instead of {len(header)} ({names})"
                )
            yield reader.line_num, fields
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def check_header(path: Path, header: list[str]) -> None:
    """Refuse a column that is there twice, as nobody can say which of the two is meant.

    Raises:
        ValueError: naming it.
    """
    for name in header:
        if name and header.count(name) > 1:
            raise ValueError(f"{path}: the column {name!r} is there twice: remove one of them")


def read_json_rows(path: Path, as_lines: bool) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with its place: one a line, or in one list.

    Raises:
        ValueError: as `read_text`; or it is no JSON, has a key twice in one object, or other things than objects.
    """
    text = read_text(path)
    if as_lines:
        # Not splitlines(): it also cuts at characters such as U+2028, which JSON strings may hold as they are.
        numbered = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(where, parsed_json(line, where)) for where, line in numbered]
    else:
        found = parsed_json(text, str(path))
        if not isinstance(found, list):
            raise ValueError(f"{path}: not a list of rows")
        rows = [(f"{path}, row {number}", row) for number, row in enumerate(found, 1)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not an object with the row's columns")
    return rows


def parsed_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, nested too deeply, or has a key twice in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError(f"{where}: no JSON: it is nested too deeply") from None
    except ValueError as error:  # also a number of too many digits
        raise ValueError(f"{where}: no JSON: {error}") from None


def once(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """The pairs of an object or a map.

    Raises:
        ValueError: a key is no text, or comes twice.
    """
    values: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r} is no text")
        if key in values:
            raise ValueError(f"the key {key!r} is there twice")
        values[key] = value
    return values
