"""Table 4 as a whole: the plan, a tiny one by the real command, and the table from records."""

from __future__ import annotations

import csv
import io
import json

import pytest
from language_helpers import save_tiny_llama

import generate_problems
import math_paper
import reproduce_math
from math_rows import row
from reproduce_math import Mathematics
from vblora.io import read_json
from vblora_experiments import campaign

TABLE = Mathematics()


def planned(*arguments):
    return TABLE.plan(campaign.parse(TABLE, ["table4", *arguments]), {})


def of_set(authors, corrected):
    rules = {"authors": authors, "corrected": corrected}
    return {"rules": {rule: {"accuracy": value, "of": 100, "unparsed": 7} for rule, value in rules.items()}}


def record(trial, gsm8k, math=None):
    scores = {"gsm8k": of_set(gsm8k, gsm8k + 1)} | ({} if math is None else {"math": of_set(math, math + 1)})
    return {
        "experiment": "math",
        "row": trial.row,
        "overrides": dict(trial.overrides),
        "seed": trial.seed,
        "settings": row(trial.row),
        "scores": scores,
        "stored_parameters": {"parameters": 647_168},
        "train_seconds": 600.0,
    }


def printed(trials, found, *more):
    return TABLE.table(trials, found, campaign.parse(TABLE, ["table4", *more]), {})


def test_table_4_is_the_papers_rows():
    trials = planned()
    assert {(t.model, t.method) for t in trials} == math_paper.TABLE_4.keys() and len(trials) == 8


def test_the_table_has_both_rules_beside_the_papers():
    trials = planned("--models", "mistral_7b", "--methods", "vblora", "--seeds", "0", "1")
    found = [record(trial, score, 18.0) for trial, score in zip(trials, (69.0, 70.0), strict=True)]
    lines = printed(trials, found).splitlines()
    assert lines[2] == (
        "| Mistral-7B | VB-LoRA | 0.647M | 2 seeds | 69.50 ± 0.71 | 18.00 ± 0.00 | 70.50 ± 0.71 | 19.00 ± 0.00 "
        "| 14/200, 14/200 |"
    )
    assert lines[3] == "|  |  | 0.65M | paper | 69.22 | 17.90 |  |  |  |"
    assert lines[4] == "|  |  |  | difference | +0.28 | +0.10 |  |  |  |"
    (line,) = csv.DictReader(io.StringIO(printed(trials, found, "--format", "csv")))
    assert float(line["gsm8k_authors"]) == 69.5 and line["math_paper"] == "17.9"


def test_a_record_that_lacks_a_set_is_to_be_done_where_it_is_asked_for():
    (both,) = planned("--models", "gemma_7b", "--methods", "full")
    (one,) = planned("--models", "gemma_7b", "--methods", "full", "--math", "none")
    assert not both.is_of(record(both, 70.0)) and one.is_of(record(both, 70.0)) and both.is_of(record(both, 70.0, 20.0))
    assert printed([one], [record(one, 70.0)]).splitlines()[2].endswith("| 70.00 |  | 71.00 |  | 7/100 |")


@pytest.fixture
def places(tmp_path):
    save_tiny_llama(tmp_path / "models" / "SmolLM2-135M-Instruct")
    generate_problems.main([str(tmp_path / "data"), "--rows", "40"])
    rows = [json.loads(line) for line in (tmp_path / "data" / "test.jsonl").read_text().splitlines()]
    solved = {"solution": r"so \boxed{3}", "type": "Algebra", "level": "Level 1"}
    maths = [{"problem": row["question"], **solved} for row in rows]
    own = [generate_problems.gsm8k_row(problem) for problem in generate_problems.generate(40, seed=5)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (tmp_path / "data" / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in maths))
    data = ["--data", str(tmp_path / "data" / "train.jsonl"), "--gsm8k", str(tmp_path / "data" / "test.jsonl")]
    return [*data, "--models_dir", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]


def test_a_small_table_then_a_further_set(places, tmp_path, capsys):
    command = ["table4", "--models", "smollm2_135m", "--methods", "vblora", *places]
    small = ["--", "--held_out", "8", "--max_new_tokens", "4", "--vector_length", "16", "--test_samples", "5"]
    small += ["--use_cpu", "true", "--max_steps", "2"]
    reproduce_math.main([*command, "--math", "none", *small])
    out, progress = capsys.readouterr()
    assert "1 runs, of which 1 are to be done" in progress and "| SmolLM2-135M | VB-LoRA |" in out
    math = ["--math", str(tmp_path / "data" / "math.jsonl"), "--collect", str(tmp_path / "kept")]
    reproduce_math.main([*command, *math, *small])
    assert "1 are to be done" in capsys.readouterr().err
    reproduce_math.main([*command, *math, *small])
    assert "0 are to be done" in capsys.readouterr().err
    (kept,) = (tmp_path / "kept").glob("*.json")
    scores = read_json(kept)["scores"]
    assert {name: scores[name]["rules"]["corrected"]["of"] for name in scores} == {"gsm8k": 5, "math": 5}
    assert len(list((tmp_path / "kept" / "answers").iterdir())) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--methods", "dora"], "unknown method 'dora'"),
        (["--data", "nonesuch.json"], r"--data nonesuch\.json: no such file"),
        (["--gsm8k", "nonesuch.jsonl"], r"--gsm8k nonesuch\.jsonl: no such file"),
        (["--models_dir", "."], r"--models_dir \. has no folder Mistral-7B-v0\.1"),
        (["--no_runs", "--runs", "nonesuch"], "no record of table4"),
        (["--", "--math", "none"], '--math after "--" would undo the plan'),
        (["--models", "smollm2_135m", "--", "--nonesuch", "3"], "nonesuch"),
        (["--models", "smollm2_135m", "--", "--test_samples", "0"], "--test_samples must be at least 1"),
    ],
)
def test_wrong_input_is_a_value_error_that_names_it(wrong, message):
    with pytest.raises(ValueError, match=message):
        reproduce_math.main(["table4", *wrong])
