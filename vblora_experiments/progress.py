"""Texts that are generated one by one, in a file that an interrupted run goes on from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Progress:
    """The texts so far, one JSON line each, after a first line with the settings they were made with."""

    def __init__(self, path: Path, settings: dict[str, Any], texts: dict[int, str]) -> None:
        self.path, self.settings, self.texts = path, settings, texts

    @classmethod
    def of(cls, path: Path, settings: dict[str, Any]) -> Progress:
        """What an interrupted run with these settings left; a line that was cut off does not count.

        Raises:
            ValueError: it was left with other settings.
        """
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        lines = whole.decode("utf-8").split("\n")
        if lines[0] == json.dumps(settings):
            os.truncate(path, len(whole) + 1)
            return cls(path, settings, {entry["number"]: entry["text"] for entry in map(json.loads, lines[1:])})
        if len(lines) > 1:
            raise ValueError(
                f"{path} holds {len(lines) - 1} texts of other settings ({lines[0]}): remove it, or use those"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return cls(path, settings, {})

    def add(self, texts: dict[int, str]) -> None:
        """Keep further texts, by number."""
        self.texts |= texts
        with self.path.open("a", encoding="utf-8") as file:
            for number, text in texts.items():
                file.write(json.dumps({"number": number, "text": text}, ensure_ascii=False) + "\n")
