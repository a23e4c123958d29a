"""Puts instruction_tuning/ on the path, as `python instruction_tuning/mt_bench_judge.py` does; a small MT-Bench."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mt_bench_helpers import PROMPTS, QUESTIONS, answer_row, write_rows

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "instruction_tuning"))


@pytest.fixture
def bench_dir(tmp_path):
    """Four questions, in the layout of one folder."""
    folder = tmp_path / "bench"
    write_rows(folder / "question.jsonl", QUESTIONS)
    references = [answer_row(number, "gpt-4", [f"ref {number} one", f"ref {number} two"]) for number in (104, 112)]
    write_rows(folder / "reference_answer" / "gpt-4.jsonl", references)
    prompts = [
        {"name": name, "type": "single", "system_prompt": f"system of {name}", "prompt_template": text}
        for name, text in PROMPTS.items()
    ]
    write_rows(folder / "judge_prompts.jsonl", prompts)
    return folder
