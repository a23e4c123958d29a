"""Recordings with transcripts: FLEURS, Common Voice, or any table of path and text, each in a local folder.

A folder holds train.tsv, dev.tsv and test.tsv; which form they have is seen from their first line:

    FLEURS         no header; id, file name, text as written, text in lower case, ...; audio/train/, audio/dev/, ...
    Common Voice   a header with path and sentence; recordings in clips/; the quoting that such tables give a text with
                   quotation marks in it is taken away
    any other      a header with path and text; paths are relative to the table's folder, or absolute

A row that is wrong is named by its file and line.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import audio
from vblora_experiments.text_files import check_header, read_text

SPLITS = ("train", "dev", "test")
LONG = ("refuse", "leave_out")  # what is done about recordings longer than the window
FLEURS_COLUMNS = 7
ESCAPED = re.compile(r'"(?:[^"]|"")*"')  # a field as tables of comma-separated values quote it
SPECIAL = re.compile(r"<\|[^|<>]*\|>")  # <|endoftext|>, <|it|>, <|0.00|>: in a label they would be spoken to the model


class Clip(NamedTuple):
    """A recording and what is said in it.

    Attributes:
        path: the file.
        text: the transcript.
        name: the recording as its table names it.
        where: the table and line, for errors.
    """

    path: Path
    text: str
    name: str
    where: str


class Set(NamedTuple):
    """The clips of a split that can be used, and what was seen on the way."""

    clips: list[Clip]
    seconds: list[float]
    left_out: list[str]
    notes: list[str]


def load_split(
    folder: str | Path, split: str, window: float = 30.0, long: str = "refuse", needs_texts: bool = True
) -> Set:
    """The clips of one split.

    Args:
        folder: with the tables of one language.
        split: "train", "dev" or "test".
        window: seconds that the model hears at once.
        long: what is done about longer recordings: "refuse" or "leave_out".
        needs_texts: False lets transcripts be empty, or their column be missing.

    Raises:
        ValueError: no such split, a wrong row, or a recording that is missing, empty, unreadable or too long; with the
            file and the line.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    table = Path(folder) / f"{split}.tsv"
    if not table.is_file():
        raise ValueError(
            f"{folder} has no {split}.tsv: it is no folder of FLEURS (of one language, such as it_it) or Common Voice, "
            "nor one with tables of path and text"
        )
    return _looked_at(read_table(table, needs_texts), window, long)


def refuse_same(data_dir: str | Path, run: Path) -> None:
    """Refuse to write the texts of a run where the transcripts are, under whose names they would be.

    Raises:
        ValueError: the folder of the data is that of the run.
    """
    if Path(data_dir).resolve() == run.resolve():
        raise ValueError(f"{run} is the folder of the data, whose tables the run would replace: give it another")


def _looked_at(clips: Sequence[Clip], window: float, long: str) -> Set:
    """The clips whose recordings fit; each file's header is read."""
    kept, seconds, left_out = [], [], []
    stereo: list[str] = []
    eight_bit: list[str] = []
    for clip in clips:
        found = audio.inspect(clip.path, clip.where)
        if found.seconds > window:
            why = f"{clip.where}: {clip.path.name} lasts {found.seconds:.1f} s, more than the window of {window:g} s"
            if long == "refuse":
                raise ValueError(f"{why}: remove the row, widen the window, or --long_clips leave_out")
            left_out.append(why)
            continue
        stereo += [clip.where] * (found.channels > 1)
        eight_bit += [clip.where] * found.eight_bit
        kept.append(clip)
        seconds.append(found.seconds)
    if not kept:
        raise ValueError(f"{clips[0].where}: no recording is short enough for a window of {window:g} s")
    notes = [
        f"{len(found)} recordings {what} (first: {found[0]})"
        for found, what in (
            (left_out, "are longer than the window and are left out"),
            (stereo, "have several channels, which are averaged"),
            (eight_bit, "have 8 bits a sample"),
        )
        if found
    ]
    return Set(kept, seconds, left_out, notes)


def read_table(table: Path, needs_texts: bool = True) -> list[Clip]:
    """The rows of a table in any of the three forms; the recordings are not looked at.

    Args:
        table: the file.
        needs_texts: False lets transcripts be empty, or their column be missing.

    Raises:
        ValueError: a form that is none of them, or a wrong row.
    """
    lines = _lines(table)
    header = [name.strip().lower() for name in lines[0].split("\t")] if lines else []
    if "path" in header and not header[0].isdigit():  # a number is the first field of FLEURS
        check_header(table, header)
        form = _form(table, header, needs_texts)
        rows, first = lines[1:], 2
    elif len(header) == FLEURS_COLUMNS:
        form = _Form(1, 2, FLEURS_COLUMNS, table.parent / "audio" / table.stem)
        rows, first = lines, 1
    else:
        raise ValueError(
            f"{table}: no table of FLEURS ({FLEURS_COLUMNS} columns without a header), of Common Voice (a header "
            f"with path and sentence) or of path and text (a header with these two, a tab between); its first line "
            f"is {_short(lines[0] if lines else '')}"
        )
    clips = [_clip(row, f"{table}, line {n}", form, needs_texts) for n, row in enumerate(rows, first) if row]
    if not clips:
        raise ValueError(f"{table}: no rows")
    _refuse_twice(clips)
    return clips


class _Form(NamedTuple):
    """Where a table has what."""

    path: int
    """The column, from 0."""
    text: int | None
    width: int
    """Of columns."""
    folder: Path
    """Of the recordings."""
    common_voice: bool = False


def _form(table: Path, header: list[str], needs_texts: bool) -> _Form:
    """The form of a table with a header: of Common Voice, or of path and text."""
    clips = table.parent / "clips"
    if "sentence" in header and ("text" not in header or clips.is_dir()):
        return _Form(header.index("path"), header.index("sentence"), len(header), clips, common_voice=True)
    if "text" not in header and needs_texts:
        raise ValueError(f"{table}: its header has path, and neither sentence nor text: {_short(', '.join(header))}")
    text = header.index("text") if "text" in header else None
    return _Form(header.index("path"), text, len(header), table.parent)


def _refuse_twice(clips: Sequence[Clip]) -> None:
    """Refuse a recording that is in two rows, however they spell its path."""
    seen: dict[str, Clip] = {}
    for clip in clips:
        first = seen.setdefault(os.path.normpath(clip.path), clip)
        if first is not clip:
            as_first = "" if first.name == clip.name else f" (there as {first.name})"
            raise ValueError(f"{clip.where}: {clip.name} a second time, after {first.where}{as_first}: remove a row")


def read_outputs(table: Path) -> dict[str, str]:
    """The texts of a table with the columns path and text by their recordings' names; a text may be empty.

    Raises:
        ValueError: other columns, or a recording twice.
    """
    lines = _lines(table)
    if lines[0].split("\t") != ["path", "text"]:
        raise ValueError(f"{table}: the first line must be path, a tab and text, not {_short(lines[0])}")
    texts: dict[str, str] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        name, tab, text = line.partition("\t")
        if not tab or "\t" in text:
            raise ValueError(f"{table}, line {number}: not a path, a tab and a text: {_short(line)}")
        if name in texts:
            raise ValueError(f"{table}, line {number}: {name} a second time")
        texts[name] = text
    if not texts:
        raise ValueError(f"{table}: no rows")
    return texts


def _clip(row: str, where: str, form: _Form, needs_texts: bool) -> Clip:
    fields = row.split("\t")
    if len(fields) != form.width:
        raise ValueError(f"{where}: {len(fields)} columns instead of {form.width}: {_short(row)}")
    name, text = fields[form.path].strip(), "" if form.text is None else fields[form.text].strip()
    if not name:
        raise ValueError(f"{where}: no path")
    if form.common_voice and ESCAPED.fullmatch(text) and '""' in text[1:-1]:
        text = text[1:-1].replace('""', '"')
    if (text or needs_texts) and (trouble := unusable(text)):
        raise ValueError(f"{where}: the transcript {_short(text)} {trouble}: mend it, or remove the row")
    path = form.folder / name
    if form.common_voice and not path.suffix:  # older releases of Common Voice leave the ending out
        path = path.with_suffix(".mp3")
    return Clip(path, text, name, where)


def unusable(text: str) -> str:
    """Why a transcript cannot be used, in words; "" if it can."""
    if not re.search(r"\w", text):
        return "has no word"
    if "\ufffd" in text or "\0" in text or re.search(r"[^\W\d_]\?[^\W\d_]", text):
        return "has a lost character"
    if token := SPECIAL.search(text):
        return f"has {token[0]}, which is a token of Whisper's and no word"
    return ""


def fingerprint(clips: Sequence[Clip], sounds: Sequence[str]) -> str:
    """SHA-256 over transcripts and recordings, wherever they lie; `sounds` are the recordings' own (`sound_prints`)."""
    digest = hashlib.sha256()
    for clip, sound in zip(clips, sounds, strict=True):
        digest.update(f"{clip.text}\0{sound}\0".encode())
    return digest.hexdigest()


def sound_prints(clips: Sequence[Clip]) -> list[str]:
    """The SHA-256 of each recording's file."""
    return [hashlib.sha256(clip.path.read_bytes()).hexdigest() for clip in clips]


def _lines(table: Path) -> list[str]:
    """The lines of a UTF-8 file; not splitlines(), which also cuts at characters that a text may hold."""
    return re.split(r"\r\n|\n|\r", read_text(table))


def _short(text: str) -> str:
    return repr(text if len(text) < 80 else text[:77] + "...")
