"""Texts that are generated one by one, in a file that an interrupted run goes on from; and files that are added to."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vblora.io import replacing


class Progress:
    """The texts so far, one JSON line each, after a first line with the settings they were made with.

    As long as the object lives, no other process can go on from the same file.
    """

    def __init__(self, path: Path, settings: dict[str, Any], texts: dict[int, str]) -> None:
        self.path, self.settings, self.texts = path, settings, texts

    @classmethod
    def of(cls, path: Path, settings: dict[str, Any], *targets: Path) -> Progress:
        """What an interrupted run with these settings left; a line that was cut off does not count.

        Args:
            path: the file.
            settings: what the texts are made with.
            targets: the files that they go into once all are there.

        Raises:
            ValueError: it was left with other settings, a line is damaged, another process is at it now, or a
                target is somebody's own: no text that was left is to become it.
        """
        lock = _locked(path)
        content = path.read_bytes() if path.exists() else b""
        whole = content.rpartition(b"\n")[0]
        first, *rest = whole.split(b"\n")
        if not rest and (there := [file for file in targets if file.exists()]):
            raise ValueError(f"{there[0]} was not written by this command, which would replace it: move it away first")
        if first == json.dumps(settings).encode():
            progress = cls(path, settings, dict(_entry(line, f"{path}, line {n}") for n, line in enumerate(rest, 2)))
            os.truncate(path, len(whole) + 1)
        elif rest:
            others = first[:500].decode(errors="replace")
            raise ValueError(f"{path} holds {len(rest)} texts of other settings ({others}): remove it, or use those")
        else:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(settings) + "\n", encoding="ascii")
            progress = cls(path, settings, {})
        weakref.finalize(progress, _free, lock)
        return progress

    def add(self, texts: dict[int, str]) -> None:
        """Keep further texts, by number; all of them, or none where they cannot be written."""
        lines = (json.dumps({"number": number, "text": text}) + "\n" for number, text in texts.items())
        append(self.path, "".join(lines).encode("ascii"))
        self.texts |= texts


def _entry(line: bytes, where: str) -> tuple[int, str]:
    try:
        entry = json.loads(line)
        number, text = entry["number"], entry["text"]
    except (ValueError, LookupError, TypeError, RecursionError):
        number = text = None
    if not isinstance(number, int) or isinstance(number, bool) or not isinstance(text, str):
        raise ValueError(f"{where}: no number with its text; the file is damaged: remove the line, or the file")
    return number, text


def append(path: Path, content: bytes) -> None:
    """Add to the end of a file, which is made if missing: all of the content, or nothing of it where that fails."""
    with path.open("ab", buffering=0) as file:  # buffered, the rest of a failed write would follow at closing
        before, left = file.tell(), memoryview(content)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:  # an interruption too
            os.truncate(path, before)
            if not before:
                path.unlink()
            raise


@contextmanager
def alone(path: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes that ask for the same from a file; with `wait`, after they are done, else with an error.

    Raises:
        ValueError: another process adds to the file, and `wait` is not set.
    """
    lock = _locked(path, wait)
    try:
        yield
    finally:
        _free(lock)


def _locked(path: Path, wait: bool = False) -> FileLock:
    """The lock of a file, taken: one for all of this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.resolve().with_name(f".{path.name}.lock"), is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            raise ValueError(f"another process adds to {path}: wait for it, or end it") from error
        print(f"{path}: waiting for another process that adds to it", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=0.5)
    return lock


def _free(lock: FileLock) -> None:
    """Give a lock back, and with the last hold remove its file: who waits for it notices, and makes another."""
    if lock.lock_counter == 1:
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
