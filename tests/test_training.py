"""Flags, records and the trainer's small parts. Whole runs are tested in tests/nlu/test_run_glue.py."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from vblora.hub import from_hub
from vblora.io import folder_fingerprint, read_json, write_json
from vblora.switch import parse_settings
from vblora.trainer import KeepBest
from vblora_experiments import commands, records, runs
from vblora_experiments.arguments import MethodArguments

LOG = [
    {"loss": 1.0, "epoch": 1.0},
    {"eval_accuracy": 0.5, "eval_f1": 0.4, "eval_runtime": 3.0, "epoch": 1.0},
    {"eval_accuracy": 0.8, "eval_f1": 0.7, "eval_runtime": 3.0, "epoch": 2.0},
    {"eval_accuracy": 0.7, "eval_f1": 0.6, "eval_runtime": 3.0, "epoch": 3.0},
]


def test_scores_are_kept_per_epoch_at_the_last_and_at_the_best():
    scores = records.scores(LOG, "accuracy")
    assert scores["last"] == {"epoch": 3.0, "accuracy": 0.7, "f1": 0.6}
    assert scores["best"] == {"epoch": 2.0, "accuracy": 0.8, "f1": 0.7}
    assert [epoch["epoch"] for epoch in scores["epochs"]] == [1.0, 2.0, 3.0]


def test_a_run_without_evaluation_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="eval_strategy"):
        records.scores(LOG[:1], "accuracy")


def test_begin_goes_on_refuses_and_returns_the_finished(tmp_path):
    assert runs.begin(tmp_path, {"seed": 0, "output_dir": "here"}) is None
    assert runs.begin(tmp_path, {"seed": 0, "output_dir": "elsewhere"}) is None  # goes on
    (tmp_path / "best").mkdir()
    with pytest.raises(ValueError, match="seed: 0 before, 1 now"):
        runs.begin(tmp_path, {"seed": 1})
    runs.finish(tmp_path, {"score": 0.5})
    assert runs.begin(tmp_path, {"seed": 0}) == {"score": 0.5}


@pytest.mark.parametrize("key", ["learning_rate", "weight_decay", "topk", "rank", "data_fingerprint", "method"])
def test_begin_refuses_whatever_changes_the_result(key, tmp_path):
    runs.begin(tmp_path, {key: 1})
    (tmp_path / "best").mkdir()
    with pytest.raises(ValueError, match=f"{key}: 1 before, 2 now"):
        runs.begin(tmp_path, {key: 2})


def test_a_run_that_a_wrong_setting_stopped_does_not_block_the_right_one(tmp_path):
    runs.begin(tmp_path, {"method": "lroa"})
    assert runs.begin(tmp_path, {"method": "lora"}) is None
    (tmp_path / "last").mkdir()
    with pytest.raises(ValueError, match="method: lora before, vera now"):
        runs.begin(tmp_path, {"method": "vera"})


def test_the_last_whole_checkpoint_is_found(tmp_path):
    for step in ("9", "10", "11", "12", "13-old"):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert runs.last_checkpoint(tmp_path) is None
    for step in ("9", "10", "13-old"):  # 11 was interrupted before its last file was written
        write_json(tmp_path / f"checkpoint-{step}" / "trainer_state.json", {})
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"epoch": ')  # and 12 while it was
    assert runs.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_the_best_adapter_is_kept_and_not_a_later_one(tmp_path):
    saved = []

    class Adapter:
        def save(self, directory, *, form="topk"):
            saved.append(directory)

    state = SimpleNamespace(log_history=[], is_world_process_zero=True)
    keep = KeepBest(Adapter(), "accuracy", tmp_path)
    counts = []
    for score in (0.5, 0.4, 0.7, 0.7, 0.6):
        state.log_history.append({"eval_accuracy": score})
        keep.on_evaluate(None, state, None)
        counts.append(len(saved))
    assert counts == [1, 1, 2, 2, 2]
    state.is_world_process_zero = False
    state.log_history.append({"eval_accuracy": 0.9})
    keep.on_evaluate(None, state, None)
    assert len(saved) == 2  # another process writes


def test_a_models_fingerprint_changes_with_its_weights_and_not_with_its_place(tmp_path):
    for folder, content in (("one", b"1"), ("two", b"1"), ("three", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(content)
    one, two, three = (folder_fingerprint(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three


def test_flags_become_the_fields_of_each_method():
    arguments = MethodArguments(method="vblora", rank=4, topk=3, num_vectors=9, vector_length=8, adapter_dropout=0.1)
    assert arguments.settings(["query"], ["classifier"]) == {
        "target_modules": ["query"],
        "modules_to_save": ["classifier"],
        "r": 4,
        "topk": 3,
        "num_vectors": 9,
        "vector_length": 8,
        "vblora_dropout": 0.1,
    }
    lora = MethodArguments(method="lora", rank=8, lora_alpha=16, adapter_dropout=0.1, method_settings='{"bias": "all"}')
    settings = lora.settings("all-linear", None)
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"], settings["bias"]) == (8, 16, 0.1, "all")


def test_learning_rates_of_the_paper_are_vb_loras_alone():
    assert MethodArguments(method="vblora").rates() == {
        "lr_vector_bank": 1e-3,
        "lr_logits": 1e-2,
        "lr_adapter": None,
    }
    assert set(MethodArguments(method="lora").rates().values()) == {None}


@pytest.mark.parametrize("text", ["", "[1]", "3", "{", "[" * 100_000, "1" * 5001], ids=range(6))
def test_settings_that_are_no_json_object_are_refused(text):
    with pytest.raises(ValueError, match="JSON"):
        parse_settings(text)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\nlines"), 2, "script: error: two lines"),
        (FileExistsError("there is a file"), 2, "script: error: there is a file"),
        (KeyboardInterrupt(), 130, "script: interrupted; the same command goes on from the last checkpoint"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(error, code, line, capsys):
    def main(arguments):
        raise error

    with pytest.raises(SystemExit) as caught:
        commands.run(main, "script")
    assert caught.value.code == code
    assert capsys.readouterr().err.strip() == line


def test_a_local_folder_that_is_no_model_is_named(tmp_path):
    def load():
        raise OSError("no config.json in it\nand more")

    with pytest.raises(ValueError) as caught:
        from_hub(load, str(tmp_path), "--flag DIR")
    assert str(caught.value) == f"{tmp_path}: no config.json in it"


def test_a_load_without_the_hub_keeps_its_reason(monkeypatch):
    """The cache may have a copy, and something else be wrong with it."""
    monkeypatch.setattr("vblora.hub.hub_in_reach", lambda: False)

    def load():
        raise OSError("no space left\nand more")

    with pytest.raises(ValueError) as caught:
        from_hub(load, "someone/model", "--flag DIR")
    assert str(caught.value) == (
        "someone/model: the hub cannot be reached, and its cache has no copy that loads (no space left); "
        "without the hub use --flag DIR"
    )


def test_environment_has_versions_and_no_path():
    environment = records.environment()
    assert {"torch", "transformers", "vblora", "python"} <= environment["versions"].keys()
    assert "/" not in json.dumps({k: v for k, v in environment.items() if k != "date"})


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
