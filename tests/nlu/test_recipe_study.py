"""The runs that compare the recipe: their flags, and their table."""

from __future__ import annotations

import json

import pytest

import quickstart
import recipe_curves
import recipe_study
import run_glue
from vblora.io import read_json, write_json


def record(score, stored=100):
    epochs = [{"epoch": 1.0, "matthews_correlation": score / 2}, {"epoch": 2.0, "matthews_correlation": score}]
    scores = {"metric": "matthews_correlation", "epochs": epochs, "last": epochs[-1], "best": epochs[-1]}
    return {
        **{"method": "vblora", "model": "m", "seed": 0, "task": "cola"},
        "scores": scores,
        "stored_parameters": {"parameters": stored, "bytes": 4 * stored},
        "settings": {"num_train_epochs": 2},
        "steps": 8,
        "train_seconds": 20.0,
    }


def test_the_table_has_mean_and_deviation_of_the_seeds():
    found = {("sentences", 3, "recipe", seed): record(score) for seed, score in enumerate((0.5, 0.7))}
    found["sentences", 3, "lora", 0] = record(0.8, 1000)
    lines = recipe_study.table(found).splitlines()
    assert "| sentences (matthews correlation) | 3 | 8 | recipe | 100 | 60.0 ± 14.1 | 50.0 70.0 | 60.0 |" in lines
    assert "| sentences (matthews correlation) | 3 | 8 | lora | 1,000 | 80.0 | 80.0 | 80.0 |" in lines


def test_rows_are_compared_with_one_seed_by_seed():
    """Differences of 10, 20 and 30: 20 +- 4.3027 * 10 / sqrt(3), and p = 1 - t / sqrt(t^2 + 2), t = 2 sqrt(3)."""
    scores = {"lora": (0.5, 0.5, 0.5), "recipe": (0.6, 0.7, 0.8), "plain": (0.4, 0.5, 0.6)}
    found = {("sentences", 3, n, seed): record(s) for n, of in scores.items() for seed, s in enumerate(of)}
    lines = recipe_study.table(found, "lora").splitlines()
    assert lines[2].endswith("| 50.0 50.0 50.0 | 50.0 |  |  |  |")
    assert lines[3].endswith("| 60.0 70.0 80.0 | 70.0 | +20.0 [-4.8, +44.8] | 0.15 | none shown |")
    assert lines[4].endswith("| 40.0 50.0 60.0 | 50.0 | +0.0 [-24.8, +24.8] | 1 | none shown |")


def test_the_search_is_listed_by_its_mean_the_best_last():
    def one(score, seed, **settings):
        return {
            "method": "vblora",
            "seed": seed,
            "settings": settings,
            "matthews_correlation": [0, score],
            "stored_parameters": 9,
        }

    runs = [one(0.9, 1, topk=1), one(0.5, 0, topk=2), one(0.7, 0, topk=1)]
    lines = recipe_study.search_table({"runs": runs}).splitlines()
    assert lines[-2].endswith("| 9 | 50.0 |") and lines[-1].endswith("| 9 | 70.0 90.0 |")


@pytest.mark.parametrize("name", recipe_study.ROWS)
def test_every_row_is_taken_by_run_glue(name, tmp_path):
    values = recipe_study.flags("sentences", name, 3, 1, tmp_path, tmp_path / "out")
    glue, method, training = run_glue.parts(run_glue.of(values))
    assert training.seed == 1 and training.num_train_epochs == 3 and glue.max_length == quickstart.COMMON["max_length"]
    assert method.settings(glue.targets, None)


def test_a_run_of_a_kept_record_is_finished(tmp_path):
    """The settings, told by their names, are those of the record, whose run was started with flags."""
    record = read_json(recipe_study.ROOT / "results" / "recipe" / "sentences_e3_recipe_seed0.json")
    out = tmp_path / "out"
    write_json(out / "run.json", record["settings"])
    write_json(out / "record.json", record)
    values = recipe_study.flags("sentences", "recipe", 3, 0, tmp_path / recipe_study.SENTENCES, out)
    assert recipe_study.train(values, tmp_path / "kept") == record
    assert read_json(tmp_path / "kept" / "out.json") == record
    with pytest.raises(ValueError, match=r"holds a run with other settings \(rank: 4 before, 2 now"):
        recipe_study.train({**values, "rank": 2}, None)


def test_a_glue_task_has_minilms_settings():
    values = recipe_study.flags("sst2", "recipe", 3, 0, "data", "out")
    assert values["max_train_samples"] == 4000 and values["head"] == "pooler,classifier" and values["targets"] == "all"


def test_kept_records_make_the_table_and_the_pictures(tmp_path, capsys):
    for seed in (0, 1):
        kept = {**record(0.6), "seed": seed, "settings": {"num_train_epochs": 3}}
        (tmp_path / f"sentences_e3_recipe_seed{seed}.json").write_text(json.dumps(kept))
    for number, over in enumerate(([], ["--over", "steps", "seconds", "bytes"])):
        picture = tmp_path / f"{number}.png"
        recipe_study.main(["recipe", "--records", str(tmp_path), "--no_runs", "--picture", str(picture), *over])
        assert "| 60.0 ± 0.0 | 60.0 60.0 | 60.0 |" in capsys.readouterr().out
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "no record of a run, or a damaged one: scores is None"),
        ({"settings": {"num_train_epochs": 3, "topk": 3}}, r"no record of this row \(topk: 3 before, 2 now\)"),
        ({"settings": {"num_train_epochs": 3, "recipe": True}}, r"\(recipe: True before, None now\)"),
        ({"seed": 7}, r"\(seed: 7 before, 0 now\)"),
        ({"steps": None}, "a damaged one: steps is None"),
    ],
)
def test_a_kept_record_that_is_damaged_or_another_rows_is_refused(changes, message, tmp_path):
    write_json(tmp_path / "sentences_e3_plain_seed0.json", {**record(0.6), **changes})
    with pytest.raises(ValueError, match=message):
        recipe_study.main(["recipe", "--records", str(tmp_path), "--no_runs", "--rows", "plain"])


@pytest.mark.parametrize(
    ("over", "points"),
    [
        ("epochs", [(1, 30), (2, 60)]),
        ("steps", [(4, 30), (8, 60)]),
        ("seconds", [(10, 30), (20, 60)]),
        ("bytes", [(400, 60)]),
    ],
)
def test_a_curve_goes_over_what_a_run_had_by_then(over, points):
    assert recipe_curves.curve(record(0.6), over) == points


def test_what_cannot_be_drawn_is_named(tmp_path):
    picture = ["--no_runs", "--picture", str(tmp_path / "p.png"), "--over", "seconds"]
    with pytest.raises(ValueError, match="there is nothing to draw"):
        recipe_study.main(["recipe", "--records", str(tmp_path), *picture])
    kept = {**record(0.6), "settings": {"num_train_epochs": 3}, "train_seconds": None}
    write_json(tmp_path / "sentences_e3_recipe_seed0.json", kept)
    with pytest.raises(ValueError, match="the record of vblora, seed 0, has no seconds to draw over"):
        recipe_study.main(["recipe", "--records", str(tmp_path), *picture])
    assert not (tmp_path / "p.png").exists()


def test_minilms_own_rows_are_found_where_table_1_keeps_them(tmp_path, capsys):
    for name, epochs in (
        ("cola_e3_recipe_small_seed0", 3),
        ("minilm_cola_lora_qv_seed0", 3),
        ("minilm_cola_lora_qv_seed1", 9),
    ):
        kept = {**record(0.2), "seed": int(name[-1]), "settings": {"num_train_epochs": epochs}}
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
    (tmp_path / "empty").mkdir()
    places = ["--records", str(tmp_path / "empty"), str(tmp_path), "--no_runs", "--glue_dir", "unused"]
    recipe_study.main(["recipe", "--tasks", "cola", "--rows", "recipe_small", "lora_qv", *places])
    assert [line.split("|")[4:8] for line in capsys.readouterr().out.splitlines()[2:]] == [
        [" recipe_small ", " 100 ", " 20.0 ", " 20.0 "],
        [" lora_qv ", " 100 ", " 20.0 ", " 20.0 "],
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no_runs"], "go together"),
        (["--tasks", "cola"], "--glue_dir"),
        (["--picture", "curves"], "must end with .png"),
        (["--against", "lora_qv"], "--against lora_qv is none of --rows"),
        (["--records", "none", "--no_runs"], "--records none is no folder"),
        (["--records", ".", "--no_runs", "--collect", "x"], "--collect copies the records of runs"),
        (["--seeds", "x"], "--seeds: invalid int value"),
    ],
)
def test_what_is_missing_is_named(flags, message):
    with pytest.raises(ValueError, match=message):
        recipe_study.main(["recipe", *flags])
