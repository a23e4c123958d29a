"""Table 2 as a whole: the plan, a tiny one run by the real command, and the table from records."""

from __future__ import annotations

import csv
import io

import pytest

import e2e_paper
import e2e_scores
import reproduce_e2e
import run_e2e
from e2e_rows import row
from reproduce_e2e import E2E
from vblora.io import read_json
from vblora_experiments import campaign
from vblora_experiments.campaign import RowTrial

TABLE = E2E()


def planned(*arguments):
    return TABLE.plan(campaign.parse(TABLE, ["table2", *arguments]), {})


def record(trial, bleu, cider=2.5, parameters=75_904):
    scores = {"BLEU": bleu, "NIST": 8.8, "METEOR": 0.466, "ROUGE_L": 0.715, "CIDEr": cider}
    return {
        "experiment": "e2e",
        "row": trial.row,
        "overrides": dict(trial.overrides),
        "seed": trial.seed,
        "settings": row(trial.row),
        "scores": scores,
        "stored_parameters": {"parameters": parameters},
        "train_seconds": 600.0,
    }


def printed(trials, found, format="markdown"):
    return TABLE.table(trials, found, campaign.parse(TABLE, ["table2", "--format", format]), {})


def test_table_2_is_the_papers_rows_and_three_seeds():
    trials = planned()
    assert len(trials) == len(e2e_paper.TABLE_2) * 3 == len({t.name for t in trials})
    assert {(t.model, t.method) for t in trials} == e2e_paper.TABLE_2.keys()
    assert [t.name for t in planned("--sizes", "large", "--methods", "vera", "--seeds", "7")] == [
        "gpt2_large_vera_seed7"
    ]


def test_the_table_has_the_mean_over_seeds_beside_the_papers():
    trials = planned("--sizes", "medium", "--methods", "vblora")
    found = [record(trial, bleu) for trial, bleu in zip(trials, (0.70, 0.71, 0.705), strict=True)]
    lines = printed(trials, found).splitlines()
    assert lines[0] == "| model | method | # params |  | BLEU | NIST | METEOR | ROUGE-L | CIDEr |"
    assert lines[2] == (
        "| GPT-2 Medium | VB-LoRA | 0.076M | 3 seeds | 70.5 ± 0.5 | 8.80 ± 0.00 | 46.6 ± 0.0 | 71.5 ± 0.0 "
        "| 2.50 ± 0.00 |"
    )
    assert lines[3] == "|  |  | 0.076M | paper | 70.0 | 8.81 | 46.6 | 71.5 | 2.52 |"
    assert lines[4] == "|  |  |  | difference | +0.5 | -0.01 | +0.0 | +0.0 | -0.02 |"
    rows = list(csv.DictReader(io.StringIO(printed(trials, found, "csv"))))
    assert len(rows) == 1 and float(rows[0]["BLEU"]) == pytest.approx(70.5) and rows[0]["NIST_paper"] == "8.81"
    assert r"70.5 $\pm$ 0.5" in printed(trials, found, "latex")
    assert printed(trials, []) is None


def test_a_score_that_one_seed_lacks_is_left_out():
    trials = planned("--sizes", "medium", "--methods", "vblora")[:2]
    found = [record(trials[0], 0.7), record(trials[1], 0.7, cider=None)]
    assert printed(trials, found).splitlines()[2].endswith("| 71.5 ± 0.0 |  |")


def test_lengths_are_estimated_from_records_or_else_from_the_paper():
    trial = RowTrial("gpt2_medium/vblora", rows=TABLE.rows)
    assert TABLE.estimate(trial, [])[0] == 180
    assert TABLE.estimate(RowTrial("gpt2_medium/lora", extra={"num_train_epochs": "1"}, rows=TABLE.rows), [])[0] == 36
    assert TABLE.estimate(trial, [record(trial, 0.7)]) == (10, "from this row's records")
    assert TABLE.estimate(RowTrial("smollm2_135m/lora", rows=TABLE.rows), []) == (None, "")


SMALL = ["--num_train_epochs", "1", "--vector_length", "16", "--num_vectors", "12", "--warmup_steps", "0"]
SMALL += ["--beam", "2", "--max_new_tokens", "8", "--decode_batch_size", "4", "--use_cpu", "true"]


@pytest.fixture
def places(models_by_kind, restaurants, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "gpt2-medium").symlink_to(models_by_kind["gpt2"])
    return ["--data_dir", str(restaurants), "--models_dir", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]


def test_a_small_table_from_nothing_then_nothing_to_do(places, tmp_path, capsys):
    command = ["table2", "--sizes", "medium", "--methods", "vblora", "--seeds", "0", *places]
    collecting = ["--collect", str(tmp_path / "kept")]
    reproduce_e2e.main([*command, *collecting, "--", *SMALL])
    out, progress = capsys.readouterr()
    assert "1 runs, of which 1 are to be done" in progress and progress.count("done after") == 1
    assert "| GPT-2 Medium | VB-LoRA |" in out and "| 1 seed |" in out and "With --num_train_epochs 1" in out
    (kept,) = (tmp_path / "kept").glob("*.json")
    assert len((tmp_path / "kept" / "texts" / f"{kept.stem}.txt").read_text().splitlines()) == 6
    reproduce_e2e.main([*command, "--", *SMALL])
    assert "1 runs, of which 0 are to be done" in capsys.readouterr().err
    again = ["--records", str(tmp_path / "kept"), "--collect", str(tmp_path / "again"), "--no_runs"]
    reproduce_e2e.main(["table2", "--sizes", "medium", "--methods", "vblora", "--seeds", "0", *again, "--", *SMALL])
    assert (tmp_path / "again" / "texts" / f"{kept.stem}.txt").exists()


def test_one_run_and_its_record(models_by_kind, restaurants, tmp_path, monkeypatch):
    """Scores that Java was missing for are added by a second call; another decoding is refused."""
    out = tmp_path / "run"
    command = ["--row", "gpt2_medium/vblora", "--model_name_or_path", str(models_by_kind["gpt2"]), *SMALL]
    command += ["--data_dir", str(restaurants), "--output_dir", str(out), "--disable_tqdm", "true"]
    monkeypatch.setattr(e2e_scores, "why_no_caption_scores", lambda: "they need Java")
    first = run_e2e.main(command)
    assert first["scores"]["BLEU"] is not None and first["scores"]["CIDEr"] is None
    assert first["row"] == "gpt2_medium/vblora" and first["overrides"]["beam"] == "2"
    assert "decode_batch_size" not in first["overrides"] and first["outputs"] == 6
    assert [set(scores) for scores in first["quick_scores"]] == [{"quick_bleu", "quick_rougeL"}]
    monkeypatch.setattr(e2e_scores, "why_no_caption_scores", lambda: "")
    caption = {"METEOR": 0.1, "ROUGE_L": 0.2, "CIDEr": 0.3}
    monkeypatch.setattr(e2e_scores, "caption_scores", lambda outputs, references: caption)
    second = run_e2e.main(command)
    assert second["scores"] == first["scores"] | caption == read_json(out / "record.json")["scores"]
    assert second["decode_seconds"] == first["decode_seconds"]
    with pytest.raises(ValueError, match=r"another decoding \(beam: 2 before, 3 now\)"):
        run_e2e.main([*command, "--beam", "3"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--methods", "dora"], "unknown method 'dora'"),
        (["--data_dir", "nonesuch"], "--data_dir nonesuch: no such folder"),
        (["--data_dir", "."], "--data_dir . has no trainset.csv or train.csv"),
        (["--models_dir", "."], "--models_dir . has no folder gpt2-medium"),
        (["--no_runs", "--runs", "nonesuch"], "no record of table2"),
        (["--", "--dataset", "e2e"], '--dataset after "--" would undo the plan'),
        (["--sizes", "medium", "--", "--nonesuch", "3"], "nonesuch"),
        (["--sizes", "medium", "--", "--beam", "0"], "--beam must be at least 1"),
        (["--sizes", "medium", "--", "--decode_batch_size", "0"], "--decode_batch_size must be at least 1"),
    ],
)
def test_wrong_input_is_a_value_error_that_names_it(wrong, message):
    with pytest.raises(ValueError, match=message):
        reproduce_e2e.main(["table2", *wrong])
