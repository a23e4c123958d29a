"""Generated problems: right, in both sets' forms, different, and the same for the same seed."""

from __future__ import annotations

import json
import re

import pytest

import authors_rule
import corrected_rule
import generate_problems
import math_references


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    generate_problems.write(folder, 400, 100, seed=0)
    return folder


def test_every_step_is_right_and_the_last_is_the_answer(folder):
    answers = [row["response"] for row in json.loads((folder / "train.json").read_text())]
    answers += [json.loads(line)["answer"] for line in (folder / "test.jsonl").read_text().splitlines()]
    assert len(answers) == 500
    for answer in answers:
        equations = re.findall(r"(\d+(?: [-+*/] \d+)+) = (\d+)", answer)
        assert 1 <= len(equations) <= 3 and all(eval(left) == int(right) for left, right in equations)
        assert equations[-1][1] == re.search(r"#### (\d+)", answer)[1]


def test_every_number_of_a_question_is_used(folder):
    for row in json.loads((folder / "train.json").read_text()):
        assert set(re.findall(r"\d+", row["query"])) <= set(re.findall(r"\d+", row["response"]))


def test_rows_have_the_forms_of_both_sets(folder):
    for row in json.loads((folder / "train.json").read_text()):
        assert set(row) == {"query", "response", "type", "original_question"}
        answer = re.search(r"\n#### (\d+)\nThe answer is: \1$", row["response"])[1]
        assert authors_rule.is_correct(row["response"], answer, "gsm8k")
        assert corrected_rule.is_correct_gsm8k(row["response"], answer)
    problems = math_references.read(folder / "test.jsonl")
    assert len(problems) == 100 and {problem.kind for problem in problems} == {"gsm8k"}


def test_no_question_twice_and_all_templates_used(folder):
    train = [row["query"] for row in json.loads((folder / "train.json").read_text())]
    test = [problem.question for problem in math_references.read(folder / "test.jsonl")]
    assert len(set(train + test)) == 500
    endings = {re.search(r"[^.]*\?$", re.sub(r"\d+", "", question))[0].split()[2] for question in train}
    assert len(endings) >= 4


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    generate_problems.main([str(tmp_path / "again"), "--rows", "400", "--test", "100"])
    generate_problems.main([str(tmp_path / "other"), "--rows", "400", "--test", "100", "--seed", "1"])
    for name in ("train.json", "test.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()


def test_sizes_that_cannot_be_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"train\.json needs at least 1 problem, not 0"):
        generate_problems.write(tmp_path, 0, 1, seed=0)
    one = generate_problems.Worked("How many?", ("1 + 1 = 2.",), 2)
    monkeypatch.setattr(generate_problems, "TEMPLATES", (lambda rng: one,))
    with pytest.raises(ValueError, match="found 1 different problems, not 2"):
        generate_problems.write(tmp_path, 1, 1, seed=0)
    assert list(tmp_path.iterdir()) == []
