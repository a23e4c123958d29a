"""Puts math_instruction_tuning/ on the path, as its scripts do, and loads score.py under a name of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "math_instruction_tuning"
sys.path.append(str(FOLDER))  # at the end: `import score` is NLG's


@pytest.fixture(scope="session")
def score_command():
    """The module of math_instruction_tuning/score.py; NLG/ has a score.py as well."""
    spec = importlib.util.spec_from_file_location("math_score_command", FOLDER / "score.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
