"""The GLUE script from end to end, on a tiny encoder and generated sentences."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, TrainerCallback

import generate_cola
import hyperparameters
import run_glue
import vblora
from vblora.storage.files import read_json, read_tensors

NLU = Path(run_glue.__file__).parent
SIZES = ["--num_vectors", "10", "--vector_length", "16", "--topk", "2"]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate_cola.write(str(folder), 64, 40, 0)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory, data) -> Path:
    """A BERT of two layers, 32 wide, with the words of the data as its vocabulary."""
    folder = tmp_path_factory.mktemp("encoder") / "tiny-bert"
    text = " ".join(line.split("\t")[3] for path in data.glob("*.tsv") for line in path.read_text().splitlines())
    words = sorted(set(re.findall(r"\w+|[^\w\s]", text.lower())))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = BertTokenizerFast(vocab=vocabulary)
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def flags(encoder, data, tmp_path):
    """The command line of a run of two epochs, and what is given besides."""

    def make(*more: str, out: Path | None = None) -> list[str]:
        places = ["--model_name_or_path", str(encoder), "--data_dir", str(data), "--task", "cola"]
        small = ["--num_train_epochs", "2", "--learning_rate", "4e-3", "--disable_tqdm", "true", "--use_cpu", "true"]
        return [*places, *small, "--output_dir", str(out or tmp_path / "run"), *more]

    return make


METHODS = {
    "vblora": SIZES,
    "tied_lora": ["--rank", "2"],
    "lora_xs": ["--rank", "4"],
    "lora": ["--rank", "2", "--lora_alpha", "2"],
    "vera": ["--rank", "8"],
    "dora": ["--rank", "2"],
    "full": [],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_leaves_a_complete_record(method, flags, tmp_path):
    run_glue.main(flags("--method", method, *METHODS[method]))
    record = read_json(tmp_path / "run" / "record.json")
    assert [epoch["epoch"] for epoch in record["scores"]["epochs"]] == [1.0, 2.0]
    assert record["scores"]["metric"] == "matthews_correlation"
    best = max(epoch["matthews_correlation"] for epoch in record["scores"]["epochs"])
    assert record["scores"]["best"]["matthews_correlation"] == best
    assert record["stored_parameters"]["parameters"] > 0
    assert record["bytes_on_disk"] >= record["stored_parameters"]["bytes"]
    assert record["train_seconds"] > 0 and record["steps"] == 4
    assert record["data"]["train_rows"] == 64 and len(record["data"]["fingerprint"]) == 64
    assert record["versions"]["torch"] == metadata.version("torch")
    assert (tmp_path / "run" / "best").is_dir()
    assert str(tmp_path) not in json.dumps(record)  # no path of this machine


def test_the_saved_adapter_gives_the_recorded_predictions(flags, encoder, tmp_path):
    record = run_glue.main(flags(*SIZES))
    model = BertForSequenceClassification.from_pretrained(encoder)
    vblora.load(model, tmp_path / "run" / "last")
    data = run_glue.load_task("cola", flags()[3])
    tokenizer = BertTokenizerFast.from_pretrained(encoder)
    rows = run_glue.tokenize(data["validation"], tokenizer, 128)
    model.eval()
    with torch.no_grad():
        guesses = [int(model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax()) for row in rows]
    scores = run_glue.compute_metrics("cola", guesses, rows["labels"])
    assert scores["matthews_correlation"] == pytest.approx(record["scores"]["last"]["matthews_correlation"])


def test_a_finished_run_is_not_run_again(flags, tmp_path, capsys):
    first = run_glue.main(flags(*SIZES))
    written = (tmp_path / "run" / "record.json").stat().st_mtime_ns
    assert run_glue.main(flags(*SIZES)) == first
    assert (tmp_path / "run" / "record.json").stat().st_mtime_ns == written
    assert "is finished already" in capsys.readouterr().out


def test_another_setting_in_the_same_folder_is_refused(flags):
    run_glue.main(flags(*SIZES))
    with pytest.raises(ValueError, match=re.escape("num_train_epochs: 2.0 before, 3.0 now")):
        run_glue.main(flags(*SIZES, "--num_train_epochs", "3"))


class Stop(Exception):
    pass


class StopAfterFirstSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise Stop


@pytest.mark.parametrize("method", ["vblora", "tied_lora", "lora_xs", "lora", "full"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(method, flags, tmp_path, monkeypatch):
    command = ["--method", method, *METHODS[method]]
    whole = run_glue.main(flags(*command, out=tmp_path / "whole"))

    original = run_glue.make_trainer

    def stopping(*arguments):
        trainer = original(*arguments)
        trainer.add_callback(StopAfterFirstSave())
        return trainer

    monkeypatch.setattr(run_glue, "make_trainer", stopping)
    with pytest.raises(Stop):
        run_glue.main(flags(*command, out=tmp_path / "parts"))
    assert not (tmp_path / "parts" / "record.json").exists()
    monkeypatch.setattr(run_glue, "make_trainer", original)
    parts = run_glue.main(flags(*command, out=tmp_path / "parts"))

    assert parts["scores"] == whole["scores"]
    for name in ("last", "best"):
        (one,) = (tmp_path / "whole" / name).glob("*.safetensors")
        other, _ = read_tensors(tmp_path / "parts" / name / one.name)
        for key, tensor in read_tensors(one)[0].items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=0)


def test_each_learning_rate_reaches_its_group_and_the_schedule_moves_all(flags, tmp_path, monkeypatch):
    trainers = []
    original = run_glue.make_trainer
    monkeypatch.setattr(run_glue, "make_trainer", lambda *a: trainers.append(original(*a)) or trainers[-1])
    rates = ["--learning_rate_vector_bank", "0.002", "--learning_rate_logits", "0.03"]
    run_glue.main(flags(*SIZES, *rates, "--weight_decay", "0.1"))
    groups = {group["name"]: group for group in trainers[0].optimizer.param_groups}
    assert {name: group["initial_lr"] for name, group in groups.items()} == {
        "vector_bank": 0.002,
        "logits": 0.03,
        "weights": 4e-3,
        "biases": 4e-3,
    }
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "vector_bank": 0.0,
        "logits": 0.0,
        "weights": 0.1,
        "biases": 0.0,
    }
    assert all(group["lr"] == 0.0 for group in groups.values())  # the linear schedule has come to its end


def test_rows_are_padded_to_the_longest_of_their_batch_only(flags, monkeypatch):
    trainers = []
    original = run_glue.make_trainer
    monkeypatch.setattr(run_glue, "make_trainer", lambda *a: trainers.append(original(*a)) or trainers[-1])
    run_glue.main(flags(*SIZES, "--num_train_epochs", "1"))
    batches = [batch["attention_mask"] for batch in trainers[0].get_eval_dataloader()]
    assert all(int(mask.sum(dim=1).max()) == mask.shape[1] for mask in batches)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--method", "lora", "--topk", "3"], "--topk does nothing with --method lora"),
        (["--method", "full", "--rank", "3"], "--rank does nothing with --method full"),
        (["--method", "lora", "--learning_rate_logits", "0.1"], "lr_logits is given, but"),
        (["--method", "nonesuch"], "PEFT has no method 'nonesuch'"),
        (["--task", "nonesuch"], "unknown task 'nonesuch'"),
        (["--targets", "nonesuch"], "match no layer"),
        (["--method_settings", "{"], "no JSON"),
        (["--row", "roberta_base"], "--row takes MODEL/TASK/TARGETS"),
        (["--data_dir", "nonesuch"], "nonesuch"),
        (["--eval_strategy", "no"], "--eval_strategy no leaves nothing to record"),
        (["--num_train_epochs", "0"], "--num_train_epochs must be above 0"),
        (["--max_length", "0"], "--max_length must be at least 3"),
        (["--method", "full", "--targets", "qv"], "--targets does nothing with --method full"),
        (["--optim", "adafactor"], "--optim"),
        (["--load_best_model_at_end", "true"], "--load_best_model_at_end does nothing"),
        (["--learning_rate", "nan"], "must be a number of at least 0, not nan"),
        (["--learning_rate_vector_bank", "-1"], "must be a number of at least 0, not -1"),
    ],
)
def test_wrong_input_is_a_value_error_that_names_it(wrong, message, flags):
    with pytest.raises(ValueError, match=re.escape(message)):
        run_glue.main(flags(*([] if "--method" in wrong else SIZES), *wrong))


def test_other_data_or_another_model_in_the_same_folder_is_refused(flags, encoder, tmp_path):
    run_glue.main(flags(*SIZES))
    generate_cola.write(tmp_path / "other_data", 64, 40, 1)
    with pytest.raises(ValueError, match="data_fingerprint"):
        run_glue.main(flags(*SIZES, "--data_dir", str(tmp_path / "other_data")))
    model = BertForSequenceClassification.from_pretrained(encoder)
    with torch.no_grad():
        model.bert.pooler.dense.bias.add_(1)
    other = tmp_path / "elsewhere" / encoder.name
    model.save_pretrained(other)
    BertTokenizerFast.from_pretrained(encoder).save_pretrained(other)
    with pytest.raises(ValueError, match="model_fingerprint"):
        run_glue.main(flags(*SIZES, "--model_name_or_path", str(other)))


def test_a_peft_file_rules_over_the_task_and_flags_over_the_file(flags, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["query"], "modules_to_save": None}))
    record = run_glue.main(flags("--method", str(path)))
    assert record["stored_parameters"]["parameters"] == 2 * 4 * (32 + 32)  # two query layers
    assert record["head_parameters"] == 32 * 2 + 2  # a null in the file leaves the task's head
    assert (record["method"], record["targets"]) == ("mine.json", "as in the file")
    smaller = flags("--method", str(path), "--method_settings", '{"r": 2}', out=tmp_path / "smaller")
    assert run_glue.main(smaller)["stored_parameters"]["parameters"] == 2 * 2 * (32 + 32)


@pytest.mark.parametrize("method", ["lora", "full", "lora_xs"])
def test_a_row_serves_other_methods_without_what_is_vb_loras_alone(method):
    glue, chosen, training = run_glue.parse(["--row=roberta_base/cola/all", f"--method={method}"])
    assert training.num_train_epochs == 80 and training.learning_rate == 2e-2
    assert chosen.topk is None and chosen.learning_rate_logits is None
    assert chosen.rank == (None if method == "full" else 4)
    assert glue.max_length == 512


def test_an_unknown_flag_is_refused(flags):
    with pytest.raises(SystemExit) as caught:
        run_glue.main(flags("--nonesuch", "1"))
    assert caught.value.code == 2


def run_script(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", **more}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_without_a_hub_it_stops_with_one_line_that_names_the_flag(data, tmp_path):
    nowhere = ["--output_dir", str(tmp_path / "run")]
    script = [sys.executable, str(NLU / "run_glue.py"), "--row", "roberta_base/cola/all", *nowhere]
    no_data = run_script(*script, HF_HOME=str(tmp_path / "empty"))
    assert no_data.returncode == 2
    assert "--data_dir DIR" in no_data.stderr.splitlines()[-1] and "Traceback" not in no_data.stderr
    no_model = run_script(*script, "--data_dir", str(data), HF_HOME=str(tmp_path / "empty"))
    assert no_model.returncode == 2
    assert "--model_name_or_path DIR" in no_model.stderr.splitlines()[-1] and "Traceback" not in no_model.stderr


def test_each_script_names_its_row_of_the_table():
    for targets in ("all", "qv"):
        for model, row in hyperparameters.MODELS.items():
            for task in row.tasks:
                text = (NLU / f"scripts_vblora_{targets}" / f"{model}_{task}.sh").read_text()
                assert f'/../run.sh" {model} {task} {targets} "$@"' in text


def test_a_script_runs_its_row_with_flags_that_override_it(encoder, data, tmp_path):
    script = NLU / "scripts_vblora_all" / "roberta_base_cola.sh"
    out = tmp_path / "run"
    small = [*SIZES, "--num_train_epochs", "1", "--use_cpu", "true", "--disable_tqdm", "true"]
    done = subprocess.run(
        [script, "--model_name_or_path", encoder, "--data_dir", data, "--output_dir", out, *small],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "SEED": "3", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    settings = read_json(out / "record.json")["settings"]
    expected = hyperparameters.row("roberta_base", "cola", "all")
    assert settings["learning_rate"] == expected["learning_rate"] and settings["seed"] == 3
    assert settings["weight_decay"] == expected["weight_decay"] and settings["num_train_epochs"] == 1
