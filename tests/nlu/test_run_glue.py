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
from transformers import BertForSequenceClassification, BertTokenizerFast, TrainerCallback

import generate_cola
import hyperparameters
import run_glue
import vblora
from vblora.files.reading import read_bank
from vblora.io import read_json, read_tensors
from vblora_experiments import runs

NLU = Path(run_glue.__file__).parent
SIZES = ["--num_vectors", "10", "--vector_length", "16", "--topk", "2"]


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
    "vblora_selection": [*SIZES, "--rule", "noisy_topk"],
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


def stop_after_first_save(arguments, monkeypatch):
    original = run_glue.make_trainer

    def stopping(*given):
        trainer = original(*given)
        trainer.add_callback(StopAfterFirstSave())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(run_glue, "make_trainer", stopping)
        with pytest.raises(Stop):
            run_glue.main(arguments)
    assert not (Path(arguments[arguments.index("--output_dir") + 1]) / "record.json").exists()


def in_two_parts(arguments, monkeypatch):
    """The record of a run that is stopped after its first checkpoint and then called again."""
    stop_after_first_save(arguments, monkeypatch)
    return run_glue.main(arguments)


@pytest.mark.parametrize("method", ["vblora", "vblora_selection", "tied_lora", "lora_xs", "lora", "full"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(method, flags, tmp_path, monkeypatch):
    command = ["--method", method, *METHODS[method]]
    whole = run_glue.main(flags(*command, out=tmp_path / "whole"))
    parts = in_two_parts(flags(*command, out=tmp_path / "parts"), monkeypatch)

    assert parts["scores"] == whole["scores"]
    for name in ("last", "best"):
        (one,) = (tmp_path / "whole" / name).glob("*.safetensors")
        other, _ = read_tensors(tmp_path / "parts" / name / one.name)
        for key, tensor in read_tensors(one)[0].items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=0)
    if method.startswith("vblora"):
        logs = [read_tensors(tmp_path / name / "selections.safetensors")[0] for name in ("whole", "parts")]
        assert logs[0].keys() == logs[1].keys() and all(torch.equal(logs[0][key], logs[1][key]) for key in logs[0])


def test_a_recipe_that_has_changed_meanwhile_does_not_name_rates_that_were_not_trained_with(
    flags, tmp_path, monkeypatch
):
    """The plan says "recipe", and the rates of an interrupted run are those of its checkpoint."""
    command = flags("--recipe", "--num_vectors", "20")
    stop_after_first_save(command, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("vblora.recipes.RATE", 4.0)
        with pytest.raises(
            ValueError, match=r"checkpoint-2 trains at the learning rates .*, and this run at .*: give the"
        ):
            run_glue.main(command)
    assert run_glue.main(command)["steps"] == 4


@pytest.mark.parametrize(
    ("method", "save_steps", "max_steps"),
    [("vblora", 3, -1), ("vblora_selection", 3, -1), ("vblora", 4, -1), ("vblora", 6, 6)],
)
def test_a_run_interrupted_at_any_step_ends_the_same_with_the_same_log(
    method, save_steps, max_steps, flags, tmp_path, monkeypatch
):
    """Within an epoch; at the last step of one, before its evaluation; at the last step of all, within an epoch."""
    command = ["--method", method, *METHODS[method], "--per_device_train_batch_size", "8", "--save_strategy", "steps"]
    command += ["--save_steps", str(save_steps), "--gradient_accumulation_steps", "2"]  # 4 steps an epoch
    command += ["--max_steps", str(max_steps)]
    whole = run_glue.main(flags(*command, out=tmp_path / "whole"))
    parts = in_two_parts(flags(*command, out=tmp_path / "parts"), monkeypatch)
    assert (parts["scores"], parts["steps"]) == (whole["scores"], whole["steps"])
    logs = [read_tensors(tmp_path / name / "selections.safetensors")[0] for name in ("whole", "parts")]
    assert logs[0].keys() == logs[1].keys() and "running_changes" not in logs[0]
    assert all(torch.equal(logs[0][key], logs[1][key]) for key in logs[0])


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
        (["--method", "lora", "--recipe", "--plan"], "--recipe does nothing with --method lora"),
        (["--method", "vblora", "--recipe_bytes", "5000", "--plan"], "do nothing without --recipe"),
        (["--method", "full", "--rank", "3"], "--rank does nothing with --method full"),
        (["--method", "lora", "--learning_rate_logits", "0.1"], "lr_logits is given, but"),
        (["--method", "nonesuch"], "there is no method 'nonesuch': ours are full, lora_xs, tied_lora, vblora"),
        (["--task", "nonesuch"], "unknown task 'nonesuch'"),
        (["--targets", "nonesuch"], "match no layer"),
        (["--method_settings", "{"], "settings are JSON, and '{' is not"),
        (["--row", "roberta_base"], "a row is MODEL/TASK/METHOD"),
        (["--data_dir", "nonesuch"], "nonesuch"),
        (["--eval_strategy", "no"], "--eval_strategy no leaves nothing to record"),
        (["--num_train_epochs", "0"], "--num_train_epochs must be above 0"),
        (["--max_length", "0"], "--max_length must be at least 3"),
        (["--method", "full", "--targets", "qv"], "--targets does nothing with --method full"),
        (["--optim", "adafactor"], "--optim"),
        (["--load_best_model_at_end", "true"], "--load_best_model_at_end does nothing"),
        (["--method", "lora", "--form", "full"], "--form does nothing with --method lora"),
        (["--method", "vblora_selection", "--rule", "best"], "rule is one of noisy_topk, gumbel, gumbel_st"),
        (["--tau", "0.5"], "--tau does nothing with --method vblora"),
        (["--start_from", "nonesuch"], "nonesuch"),
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


def test_flags_override_their_row_and_the_record_says_which():
    command = ["--row=roberta_base/cola/vblora_all", "--topk", "3", "--seed", "4", "--data_dir", "here"]
    glue, chosen, training = run_glue.parse(command)
    assert training.num_train_epochs == 80 and training.learning_rate == 2e-2 and training.seed == 4
    assert (chosen.topk, chosen.rank, glue.max_length) == (3, 4, 512)
    assert runs.overrides(command) == {"topk": "3"}
    assert runs.overrides(["--bf16", "--num-train-epochs=3"]) == {"bf16": "true", "num_train_epochs": "3"}


def test_plan_shows_what_the_run_resolves_and_writes_nothing(flags, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert run_glue.main(flags(*SIZES, "--plan")) == {}
    shown = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert shown["topk"] == ["2", "flag"] and shown["max_length"] == ["128", "default"]
    assert shown["learning_rate_logits"] == ["0.01", "default,", "the", "paper's"]
    assert sorted(tmp_path.rglob("*")) == before
    config = tmp_path / "run.yaml"
    config.write_text("topk: 3\nnum_train_epochs: 1\nlearning_rate_logits: 2e-2\n")
    record = run_glue.main(flags(*SIZES, "--config", str(config)))  # whose --topk and --num_train_epochs are flags
    assert record["overrides"]["learning_rate_logits"] == "0.02" and record["settings"]["topk"] == 2
    assert record["settings"]["learning_rate_logits"] == 0.02 and record["steps"] == 4
    assert "config" not in record["settings"] and str(tmp_path) not in str(record)


def test_the_log_has_the_rate_of_every_group(flags, tmp_path):
    run_glue.main(flags(*SIZES, "--num_train_epochs", "1", "--learning_rate_logits", "0.02"))
    (state,) = (tmp_path / "run").glob("checkpoint-*/trainer_state.json")
    (entry,) = (e for e in read_json(state)["log_history"] if "learning_rate" in e)
    assert entry["learning_rate_logits"] == pytest.approx(20 * entry["learning_rate_vector_bank"])
    assert {"learning_rate_weights", "learning_rate_biases"} <= entry.keys()


def test_an_unknown_flag_is_refused(flags):
    with pytest.raises(ValueError, match="--nonesuch"):
        run_glue.main(flags("--nonesuch", "1"))


def run_script(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", **more}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_without_a_hub_it_stops_with_one_line_that_names_the_flag(data, tmp_path):
    nowhere = ["--output_dir", str(tmp_path / "run")]
    script = [sys.executable, str(NLU / "run_glue.py"), "--row", "roberta_base/cola/vblora_all", *nowhere]
    no_data = run_script(*script, HF_HOME=str(tmp_path / "empty"))
    assert no_data.returncode == 2
    assert "--data_dir DIR" in no_data.stderr.splitlines()[-1] and "Traceback" not in no_data.stderr
    no_model = run_script(*script, "--data_dir", str(data), HF_HOME=str(tmp_path / "empty"))
    assert no_model.returncode == 2
    assert "--model_name_or_path DIR" in no_model.stderr.splitlines()[-1] and "Traceback" not in no_model.stderr


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
    expected = hyperparameters.row("roberta_base/cola/vblora_all")
    assert settings["learning_rate"] == expected["learning_rate"] and settings["seed"] == 3
    assert settings["weight_decay"] == expected["weight_decay"] and settings["num_train_epochs"] == 1


def test_padding_to_the_maximum_changes_the_speed_and_not_the_scores(flags, tmp_path):
    """With the same order of rows; dropout off, because its random numbers are drawn by shape."""
    command = [*SIZES, "--train_sampling_strategy", "random", "--max_length", "48", "--num_train_epochs", "1"]
    rows, evaluations = [], []
    for name, more in (("short", []), ("padded", ["--pad_to_max_length", "true"])):
        trainer = prepared(flags(*command, *more, out=tmp_path / name))
        trainer.model.eval()
        rows.append([batch["input_ids"].shape[1] for batch in trainer.get_eval_dataloader()])
        evaluations.append(trainer.predict(trainer.eval_dataset).predictions)
    assert set(rows[1]) == {48} and max(rows[0]) < 48
    torch.testing.assert_close(torch.tensor(evaluations[0]), torch.tensor(evaluations[1]), rtol=0, atol=1e-5)


def prepared(arguments):
    """The trainer of a run, as run_glue.main makes it."""
    glue, method, training = run_glue.parse(arguments)
    task = run_glue.get_task(glue.task)
    data = run_glue.load_task(task.name, glue.data_dir)
    run_glue.set_seed(0)
    adapted, tokenizer = run_glue.build(glue, method, task)
    return run_glue.make_trainer(glue, method, training, data, adapted, tokenizer, Path(str(training.output_dir)))


STARTS = {"vblora": [*SIZES, "--form", "full"], "tied_lora": ["--rank", "2"], "lora": ["--rank", "2"], "full": []}


@pytest.mark.parametrize("method", STARTS)
def test_a_run_starts_from_another_tasks_adapter_with_a_head_of_its_own(method, flags, data, tmp_path):
    """From three labels to two, as from MNLI to the smaller tasks."""
    pairs = [{"premise": f"a b {i}", "hypothesis": f"b {i}", "label": i % 3} for i in range(24)]
    (tmp_path / "mnli").mkdir()
    for name in ("train", "dev_matched"):
        (tmp_path / "mnli" / f"{name}.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    first = ["--method", method, *STARTS[method]]
    run_glue.main(flags(*first, "--task", "mnli", "--data_dir", str(tmp_path / "mnli"), out=tmp_path / "first"))
    start = tmp_path / "first" / "best"
    second = ["--method", method, *STARTS[method], "--start_from", str(start)]
    trainer = prepared(flags(*second, out=tmp_path / "second"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.adapter.start_from(str(start))
    after = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("classifier" in name for name in moved)
    record = run_glue.main(flags(*second, out=tmp_path / "second"))
    assert len(record["settings"]["start_from"]) == 64 and "start_from" not in record["overrides"]


def test_a_further_task_on_the_frozen_bank_of_another(flags, tmp_path):
    first = run_glue.main(flags(*SIZES, out=tmp_path / "first"))
    bank = read_bank(tmp_path / "first" / "last")
    record = run_glue.main(
        flags(*SIZES, "--seed", "1", "--bank_from", str(tmp_path / "first" / "last"), out=tmp_path / "second")
    )
    assert torch.equal(read_bank(tmp_path / "second" / "last"), bank)
    alone, further = first["stored_parameters"], record["stored_parameters"]
    assert alone["parameters"] - further["parameters"] == bank.numel()
    assert alone["bytes"] - further["bytes"] == 4 * bank.numel()
    assert len(record["settings"]["bank_from"]) == 64 and "bank_from" not in record["overrides"]
    trainer = prepared(flags(*SIZES, "--bank_from", str(tmp_path / "first" / "last"), out=tmp_path / "third"))
    assert not any("vector_bank" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "lora", "--rank", "2"], "--bank_from does nothing with --method lora"),
        ([*SIZES, "--num_vectors", "5"], "num_vectors and vector_length must be the same"),
        (
            [*SIZES, "--topk", "1"],
            "--bank_from leaves nothing of the adapter to train where one vector makes a sub-vector: .*--topk 2",
        ),
        (["--recipe"], "one vector makes a sub-vector, as by --recipe: the selection never moves; give --topk 2"),
    ],
)
def test_a_bank_that_does_not_serve_is_named(more, message, flags, tmp_path):
    run_glue.main(flags(*SIZES, out=tmp_path / "first"))
    with pytest.raises(ValueError, match=message):
        run_glue.main(flags(*more, "--bank_from", str(tmp_path / "first" / "last"), out=tmp_path / "second"))


def test_a_folder_without_a_bank_is_named(flags, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        run_glue.main(flags(*SIZES, "--bank_from", str(tmp_path)))
    run_glue.main(flags("--method", "tied_lora", "--rank", "2", out=tmp_path / "first"))
    with pytest.raises(ValueError, match="holds no vector bank"):
        run_glue.main(flags(*SIZES, "--bank_from", str(tmp_path / "first" / "last")))


def test_the_top_k_form_is_refused_as_a_start(flags, tmp_path):
    run_glue.main(flags(*SIZES, out=tmp_path / "first"))
    with pytest.raises(ValueError, match="to train on it must be the full one"):
        run_glue.main(flags(*SIZES, "--start_from", str(tmp_path / "first" / "best"), out=tmp_path / "second"))


def test_the_recipe_chooses_sizes_and_rates_and_the_record_has_them(flags, tmp_path, monkeypatch, capsys):
    rates = {}

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **more):
            rates.update({group["name"]: group["initial_lr"] for group in optimizer.param_groups})

    make = run_glue.make_trainer

    def noting(*everything):
        trainer = make(*everything)
        trainer.add_callback(Note())
        return trainer

    monkeypatch.setattr(run_glue, "make_trainer", noting)
    run_glue.main(flags("--recipe", "--recipe_lora_rate", "1e-3", "--num_vectors", "20", "--num_train_epochs", "1"))
    record = read_json(tmp_path / "run" / "record.json")
    chosen = record["recipe"]
    assert chosen["rates"] == {"lr_vector_bank": 2e-3, "lr_logits": 0.0} and rates["vector_bank"] == 2e-3
    assert rates["weights"] == 4e-3 and record["settings"]["recipe"] is True
    assert chosen["config"] == record["adapter_settings"] and chosen["config"]["init_vectors_of_a"] == 5
    assert "rate of the bank" in capsys.readouterr().out
    other = ("--learning_rate_vector_bank", "3e-3", "--warmup_steps", "0.5", "--max_grad_norm", "0.3", "--seed", "1")
    out = ("--output_dir", str(tmp_path / "other"))
    run_glue.main(flags("--recipe", "--num_vectors", "20", "--num_train_epochs", "1", *other, *out))
    chosen = read_json(tmp_path / "other" / "record.json")["recipe"]
    assert chosen["rates"] == {"lr_vector_bank": 3e-3, "lr_logits": 0.0} and rates["vector_bank"] == 3e-3
    assert (chosen["warmup"], chosen["max_grad_norm"]) == (0.5, 0.3)
    shown = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    assert shown["rate of the bank"] == ["0.003", "as", "given"] and shown["gradient clipped to"][0] == "0.3"
