"""The command score_math.py and math_scores: counts, parts, lists, forms of outputs, and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import math_scores
import score_math
from math_references import Problem

ROOT = Path(__file__).resolve().parents[2]
GSM8K = [Problem(n, "How many?", reference, "gsm8k") for n, reference in enumerate(("18", "18", "3", "7", "5"), 1)]
OUTPUTS = ["The answer is: 18", "The answer is: 1800", "So it is\n#### 3", "no idea", "The answer is: 5.4"]


def math_problem(number, reference, level="Level 1", subject="Algebra"):
    return Problem(number, "Find it.", reference, "math", level, subject)


def write_gsm8k(folder):
    rows = [json.dumps({"question": p.question, "answer": f"It is so.\n#### {p.reference}"}) for p in GSM8K]
    (folder / "problems.jsonl").write_text("\n".join(rows))
    (folder / "outputs.jsonl").write_text("".join(json.dumps({"output": output}) + "\n" for output in OUTPUTS))
    return [str(folder / "outputs.jsonl"), str(folder / "problems.jsonl")]


def test_gsm8k_by_both_rules():
    result = math_scores.score(OUTPUTS, GSM8K)
    authors, corrected = result["rules"]["authors"], result["rules"]["corrected"]
    assert (authors["correct"], authors["unparsed"], authors["accuracy"]) == (3, 2, 60.0)
    assert (corrected["correct"], corrected["unparsed"], corrected["accuracy"]) == (2, 1, 40.0)
    assert result["disagreements"] == 3
    assert result["extracted_from"] == {"####": 1, "marker": 3, "no answer": 1}
    assert {row["number"]: row["reason"] for row in result["listed"]} == {
        2: "right by the authors rule only",
        3: "authors: unparsed; right by the corrected rule only",
        4: "authors: unparsed; corrected: unparsed",
        5: "right by the authors rule only",
    }


def test_math_by_level_and_subject():
    pytest.importorskip("math_verify")
    problems = [
        math_problem(1, "\\frac{1}{2}"),
        math_problem(2, "2\\sqrt{3}", "Level 2"),
        math_problem(3, "42", "Level 2", "Geometry"),
        math_problem(4, "7", "", ""),
    ]
    outputs = ["The answer is: 1/2", "Thus \\boxed{\\sqrt{12}}.", "The answer is: x/2", ""]
    result = math_scores.score(outputs, problems)
    assert result["rules"]["authors"]["correct"] == 2  # x/2 by the authors' defect
    assert result["rules"]["corrected"] == {
        "correct": 2, "of": 4, "accuracy": 50.0, "unparsed": 1, "timed_out": 0, "failed": 0
    }  # fmt: skip
    assert {level: row["correct"] for level, row in result["levels"].items()} == {
        "Level 1": 1, "Level 2": 1, "not given": 0
    }  # fmt: skip
    assert {name: (row["correct"], row["of"]) for name, row in result["subjects"].items()} == {
        "Algebra": (2, 2), "Geometry": (0, 1), "not given": (0, 1)
    }  # fmt: skip
    assert result["disagreements"] == 2


def test_an_answer_that_takes_too_long_is_counted_and_listed(capsys):
    pytest.importorskip("math_verify")
    problems = [math_problem(1, "(3^{3^{3^{3^{3}}}})!"), math_problem(2, "5")]
    outputs = ["The answer is: 2^{2^{2^{2^{2^{2}}}}} + 1", "The answer is: 5."]
    result = math_scores.score(outputs, problems, time_limit=2.0)
    assert result["rules"]["corrected"]["timed_out"] == 1 and result["rules"]["corrected"]["correct"] == 1
    assert "corrected: timed out" in result["listed"][0]["reason"]
    score_math.print_table(result)
    assert "1 answers timed out in judging" in capsys.readouterr().err


def test_several_workers_give_the_same():
    pytest.importorskip("math_verify")
    problems = [math_problem(n, str(n)) for n in range(1, 7)]
    outputs = [f"The answer is: {2 * n}/2." if n % 2 else f"The answer is: {n}1" for n in range(1, 7)]
    one, two = (math_scores.score(outputs, problems, workers=workers) for workers in (1, 2))
    assert one == two and one["rules"]["corrected"]["correct"] == 3


@pytest.mark.parametrize(
    ("outputs", "problems", "message"),
    [([], [], "0 outputs and 0 problems"), (["5"], GSM8K, "1 outputs and 5 problems")],
)
def test_outputs_and_problems_go_in_pairs(outputs, problems, message):
    with pytest.raises(ValueError, match=message):
        math_scores.score(outputs, problems)


def test_two_kinds_are_scored_apart():
    with pytest.raises(ValueError, match="apart"):
        math_scores.score(["5", "5"], [GSM8K[0], math_problem(2, "5")])


def test_the_forms_of_outputs(tmp_path):
    for key in (*math_scores.KEYS, None):
        row = "a\nb" if key is None else {"number": 1, key: "a\nb"}
        (tmp_path / "o.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps({"output": ""}) + "\n")
        assert math_scores.read_outputs(tmp_path / "o.jsonl") == ["a\nb", ""]
    (tmp_path / "o.json").write_text('["a", {"text": "b"}]')
    assert math_scores.read_outputs(tmp_path / "o.json") == ["a", "b"]
    (tmp_path / "o.txt").write_text("The answer is: $\\nu$\r\n\r\n\u2028b\n", encoding="utf-8", newline="")
    assert math_scores.read_outputs(tmp_path / "o.txt") == ["The answer is: $\\nu$", "", "\u2028b"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("o.jsonl", '"a"\n{"answer": "b"}', "line 2: no output"),
        ("o.jsonl", '{"output": null}', "line 1: no output"),
        ("o.jsonl", "a", "line 1: no JSON"),
        ("o.txt", "", "no outputs"),
        ("none.txt", None, "no such file"),
    ],
)
def test_outputs_that_cannot_be_read_are_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        math_scores.read_outputs(tmp_path / name)


def test_the_command_prints_and_writes(tmp_path, capsys):
    files = write_gsm8k(tmp_path)
    score_math.main([*files, "--json", str(tmp_path / "s.json"), "--list", str(tmp_path / "l.jsonl")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["authors", "3", "5", "60.00", "2"]
    assert lines[2].split() == ["corrected", "2", "5", "40.00", "1"]
    assert lines[3] == "the rules disagree on 3 of 5 problems"
    assert json.loads((tmp_path / "s.json").read_text())["rules"]["authors"]["accuracy"] == 60.0
    listed = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert [row["number"] for row in listed] == [2, 3, 4, 5]
    assert listed[1] == {
        "number": 3, "reference": "3", "authors": None, "corrected": "3", "taken_from": "####",
        "reason": "authors: unparsed; right by the corrected rule only",
    }  # fmt: skip


def test_an_output_with_half_a_character_is_listed(tmp_path):
    files = write_gsm8k(tmp_path)
    Path(files[0]).write_text('"The answer is: 1800 \\ud800"\n' * 5)  # 18 by the authors' rule
    score_math.main([*files, "--list", str(tmp_path / "l.jsonl")])
    first = json.loads((tmp_path / "l.jsonl").read_text().splitlines()[0])
    assert (first["number"], first["corrected"]) == (1, "1800 \ud800")


def test_unequal_counts_are_one_line_that_names_both_files(tmp_path):
    outputs, problems = write_gsm8k(tmp_path)
    Path(outputs).write_text('"5"\n')
    ended = subprocess.run(
        [sys.executable, str(ROOT / "math_instruction_tuning" / "score_math.py"), outputs, problems],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == (
        f"score_math: error: {outputs} has 1 outputs and {problems} has 5 problems: each problem needs one output\n"
    )


def test_a_folder_for_the_results_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match=r"--list .*: is a folder"):
        score_math.main([*write_gsm8k(tmp_path), "--list", str(tmp_path)])
