"""Table 3 as a whole: the plan, a tiny one by the real command with a judge on this machine, and the table."""

from __future__ import annotations

import csv
import io

import pytest
from language_helpers import save_tiny_llama
from mt_bench_helpers import JudgeServer

import generate_instructions
import instruct_paper
import mt_bench
import reproduce_instruct
from instruct_rows import row
from reproduce_instruct import Instructions
from vblora.io import read_json
from vblora_experiments import campaign
from vblora_experiments.campaign import RowTrial

TABLE = Instructions()


def planned(*arguments):
    return TABLE.plan(campaign.parse(TABLE, ["table3", *arguments]), {})


def record(trial, first, judge="gpt-4"):
    scores = {judge: {"turn1": first, "turn1_sound": first + 0.1, "turn2": first - 1}} if judge else {}
    return {
        "experiment": "instruct",
        "row": trial.row,
        "overrides": dict(trial.overrides),
        "seed": trial.seed,
        "settings": row(trial.row),
        "scores": scores,
        "held_out_losses": [{"step": 0, "loss": 1.5}, {"step": 9, "loss": 1.0}],
        "stored_parameters": {"parameters": 582_848},
        "train_seconds": 600.0,
    }


def printed(trials, found, *more):
    return TABLE.table(trials, found, campaign.parse(TABLE, ["table3", *more]), {})


def test_table_3_is_the_papers_rows():
    trials = planned()
    assert {(t.model, t.method) for t in trials} == {key for key in instruct_paper.TABLE_3 if key[1] != "base"}
    assert len({t.name for t in trials}) == len(trials) == 6


def test_the_table_has_the_rating_beside_the_papers():
    trials = planned("--models", "llama2_7b", "--methods", "vblora", "--seeds", "0", "1")
    found = [record(trial, rating) for trial, rating in zip(trials, (5.5, 5.7), strict=True)]
    lines = printed(trials, found).splitlines()
    assert lines[2] == (
        "| Llama2-7B | VB-LoRA | 0.583M | 2 | 1.50 | 1.00 | gpt-4 | 5.60 | 0.14 | 5.70 | 4.60 | 5.71 | -0.11 |"
    )
    rows = list(csv.DictReader(io.StringIO(printed(trials, found, "--format", "csv"))))
    assert float(rows[0]["turn 1"]) == pytest.approx(5.6)
    unjudged = [record(trials[0], 0, judge=""), found[1]]
    assert "| nobody yet |  |  |  |  | 5.71 |  |" in printed(trials, unjudged)
    assert printed(trials, []) is None


def test_a_record_without_the_judges_scores_is_to_be_done_where_they_are_asked_for():
    (trial,) = planned("--models", "llama2_7b", "--methods", "vblora")
    (judged,) = planned("--models", "llama2_7b", "--methods", "vblora", "--judge", "gpt-4")
    assert trial.is_of(record(trial, 5, judge="")) and not judged.is_of(record(trial, 5, judge=""))
    assert judged.is_of(record(trial, 5)) and judged.name == trial.name


def test_lengths_are_estimated_from_records_or_else_from_the_paper():
    trial = RowTrial("llama2_7b/vblora", rows=TABLE.rows)
    assert TABLE.estimate(trial, [])[0] == 150 and TABLE.estimate(
        RowTrial("smollm2_135m/lora", rows=TABLE.rows), []
    ) == (None, "")
    assert TABLE.estimate(trial, [record(trial, 5)]) == (10, "from this row's records")


@pytest.fixture
def places(bench_dir, tmp_path):
    save_tiny_llama(tmp_path / "models" / "SmolLM2-135M-Instruct")
    generate_instructions.main([str(tmp_path / "rows.json"), "--rows", "40"])
    folders = [
        "--models_dir",
        str(tmp_path / "models"),
        "--bench_dir",
        str(bench_dir),
        "--runs",
        str(tmp_path / "runs"),
    ]
    return [*folders, "--data", str(tmp_path / "rows.json")]


def test_a_small_table_is_judged_when_a_judge_is_named(places, tmp_path, monkeypatch, capsys):
    command = ["table3", "--models", "smollm2_135m", "--methods", "vblora", *places]
    small = ["--", "--held_out", "8", "--max_new_tokens", "4", "--vector_length", "16", "--use_cpu", "true"]
    reproduce_instruct.main([*command, *small])
    out, progress = capsys.readouterr()
    assert "1 runs, of which 1 are to be done" in progress and "not judged; 4 questions answered" in progress
    assert "nobody yet" in out
    server = JudgeServer()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    try:
        judged = [*command, "--judge", "strict", "--collect", str(tmp_path / "kept")]
        reproduce_instruct.main([*judged, *small])
        out, progress = capsys.readouterr()
        assert "1 runs, of which 1 are to be done" in progress and "| strict |" in out
        assert len(server.requests) == 8  # four questions, two turns
        reproduce_instruct.main([*judged, *small])
        assert "0 are to be done" in capsys.readouterr().err and len(server.requests) == 8
    finally:
        server.close()
    (kept,) = (tmp_path / "kept").glob("*.json")
    scores = read_json(kept)["scores"]["strict"]
    judgments = mt_bench.read_judgments(next((tmp_path / "runs").rglob("strict_single.jsonl")))
    first = [j.score for j in judgments if j.turn == 1]
    assert scores["turn1"] == pytest.approx(sum(first) / len(first)) and scores["turn1_unrated"] == 0
    sound = [j.score for j in judgments if j.turn == 1 and j.question_id not in mt_bench.KNOWN_WRONG]
    assert scores["turn1_sound"] == pytest.approx(sum(sound) / len(sound)) and len(sound) == 3
    assert len((tmp_path / "kept" / "answers" / f"{kept.stem}.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--methods", "dora"], "unknown method 'dora'"),
        (["--data", "nonesuch.json"], r"--data nonesuch\.json: no such file"),
        (["--bench_dir", "nonesuch"], "--bench_dir nonesuch: no such folder"),
        (["--models_dir", "."], r"--models_dir \. has no folder Llama-2-7b-hf"),
        (["--no_runs", "--runs", "nonesuch"], "no record of table3"),
        (["--", "--judge", "gpt-4"], '--judge after "--" would undo the plan'),
        (["--models", "smollm2_135m", "--", "--nonesuch", "3"], "nonesuch"),
        (["--models", "smollm2_135m", "--", "--max_questions", "0"], "--max_questions must be at least 1"),
    ],
)
def test_wrong_input_is_a_value_error_that_names_it(wrong, message):
    with pytest.raises(ValueError, match=message):
        reproduce_instruct.main(["table3", *wrong])
