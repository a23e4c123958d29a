"""Problems and reference answers: forms of rows, the last box, errors with their place, and the real sets."""

from __future__ import annotations

import json
from collections import Counter

import pytest

import math_references
from math_references import Problem

GSM8K = {"question": "How many?", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,002"}
MATH = {"instruction": "Find $x$.", "output": "So $x=\\boxed{\\frac{1}{2}}$.", "type": "Algebra", "level": "Level 3"}


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{5}", "5"),
        ("\\boxed{1} then \\fbox{2}", "2"),
        ("\\fbox{1} then $\\boxed{ \\frac{1}{\\sqrt{2}} }$.", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{ x \\right.} and }", "\\left\\{ x \\right."),
        ("$\\boxed 2$.", "2"),
        ("$\\boxed\\pi$", "\\pi"),
        ("\\boxed{7} and \\boxed{8", "7"),
        ("\\boxed{}", ""),
        ("\\boxedtext{1}", None),
        ("\\boxed", None),
        ("5", None),
    ],
)
def test_the_last_box(text, inside):
    assert math_references.last_box(text) == inside


def write(path, rows):
    lines = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["problems.jsonl", "problems.json"])
def test_rows_of_each_form(tmp_path, name):
    original = {"problem": MATH["instruction"], "solution": MATH["output"], "type": "Algebra", "level": "Level 3"}
    assert math_references.read(write(tmp_path / name, [GSM8K])) == [Problem(1, "How many?", "1,002", "gsm8k")]
    two = math_references.read(write(tmp_path / name, [MATH, original]))
    assert two == [Problem(n, "Find $x$.", "\\frac{1}{2}", "math", "Level 3", "Algebra") for n in (1, 2)]


def test_blank_lines_and_marks_at_the_start_are_left_out(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GSM8K).encode() + b"\r\n\r\n" + json.dumps(GSM8K).encode())
    assert [problem.number for problem in math_references.read(path)] == [1, 2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no problems"),
        ([GSM8K, "{\n"], "line 2: no JSON"),
        ([GSM8K, [1]], "line 2: not a row of gsm8k: needs the keys question and answer"),
        ([GSM8K, MATH], "line 2: not a row of gsm8k"),
        (["\n", {"text": "x"}], "line 2: neither GSM8K's keys"),
        ([GSM8K | {"answer": "5"}], 'line 1: answer has no reference answer: it lacks a last line "#### "'),
        ([GSM8K | {"answer": "#### 5\nor 6"}], "line 1: answer has no reference"),
        ([GSM8K | {"answer": 5}], "line 1: question and answer must be texts"),
        ([MATH, MATH | {"output": "5"}], r"line 2: output has no reference answer: it lacks a \\boxed"),
        ([MATH | {"output": "\\boxed{}"}], "line 1: output has no reference"),
        ([MATH | {"level": [[]]}], "line 1: level must be a text"),
    ],
)
def test_malformed_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        math_references.read(write(tmp_path / "problems.jsonl", rows))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file \(names on the hub: openai/gsm8k"):
        math_references.read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="a folder"):
        math_references.read(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        math_references.read(tmp_path / "latin.jsonl")
    with pytest.raises(ValueError, match="not a JSON list"):
        (tmp_path / "one.json").write_text("{}")
        math_references.read(tmp_path / "one.json")


@pytest.mark.parametrize("text", ["[" * 10**5, "9" * 5000], ids=["deep", "a long number"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_json_that_python_cannot_read_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*: no JSON"):
        math_references.read(tmp_path / name)


def test_a_set_on_the_hub_is_all_its_parts(monkeypatch):
    asked = []

    def load(name, part):
        asked.append((name, part))
        return [{"problem": part, "solution": "\\boxed{1}", "type": part, "level": "Level 1"}]

    monkeypatch.setattr(math_references, "_load_part", load)
    monkeypatch.setattr("vblora.hub.hub_in_reach", lambda: True)
    problems = math_references.read("EleutherAI/hendrycks_math")
    assert len(problems) == len(asked) == 7
    assert [problem.number for problem in problems] == [1, 2, 3, 4, 5, 6, 7]


def test_the_real_sets(real_data):
    gsm8k = math_references.read(real_data("gsm8k") / "test.jsonl")
    assert len(gsm8k) == 1319 and gsm8k[0].reference == "18"
    math = math_references.read(real_data("math") / "MATH_test.jsonl")
    levels = {f"Level {level}": count for level, count in zip(range(1, 6), (437, 894, 1131, 1214, 1324), strict=True)}
    assert len(math) == 5000 and Counter(problem.level for problem in math) == levels
    assert len({problem.subject for problem in math}) == 7
