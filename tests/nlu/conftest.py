"""Puts NLU/ on the path, as `python NLU/run_glue.py` does, and finds the real data where it is present."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "NLU"))


@pytest.fixture
def real_data():
    """A function from a folder name to that folder of real data; skips where it is missing."""
    base = Path(os.environ.get("VBLORA_DATA") or ROOT.parent / "shared" / "data")

    def folder(name: str) -> Path:
        if not (base / name).is_dir():
            pytest.skip(f"real data {name!r} is not in {base} (set VBLORA_DATA to its place)")
        return base / name

    return folder
