"""Puts math_instruction_tuning/ on the path, as its scripts do."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "math_instruction_tuning"
sys.path.insert(0, str(FOLDER))
