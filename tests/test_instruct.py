"""Instruction tuning from a file to an adapter, and the plan that is printed without weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from language_helpers import save_tiny_llama, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, OPTForCausalLM, TrainerCallback

import vblora
from vblora import models
from vblora.io import read_json, read_tensors
from vblora_experiments import causal, estimate, instruct, runs

ROWS = {"tiny/lora": {"method": "lora", "rank": 2, "learning_rate": 1e-2}}


def row(name):
    return ROWS[name]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    rows = [
        {"instruction": f"Say {word}.", "input": "now" if at % 3 else "", "output": f"{word} {word}"}
        for at, word in enumerate(["blue", "green", "one", "two", "sun", "moon"] * 6)
    ]
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def flags(base, data, tmp_path):
    def make(*more, out="run"):
        small = ["--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true"]
        small += ["--held_out", "6", "--source_max_length", "160", "--target_max_length", "12"]
        places = ["--model_name_or_path", str(base), "--data", str(data), "--output_dir", str(tmp_path / out)]
        return [*places, *small, "--disable_tqdm", "true", *more]

    return make


def folder(tmp_path=Path("runs")):
    return instruct.Folder("test", {"data_format": "alpaca", "data": "hub/name"}, row, tmp_path)


VBLORA = ["--num_vectors", "12", "--vector_length", "16", "--topk", "2", "--learning_rate_vector_bank", "1e-2"]


@pytest.mark.parametrize(
    "more",
    [
        VBLORA,
        [*VBLORA, "--pack_length", "200", "--gradient_checkpointing", "true", "--gradient_accumulation_steps", "2"],
        ["--recipe", "--recipe_lora_rate", "5e-3", "--recipe_bytes", "9000", "--vector_length", "16"],
        ["--row", "tiny/lora"],
        ["--method", "lora_xs", "--rank", "4", "--learning_rate", "1e-2", "--targets", "qv"],
        ["--method", "full", "--learning_rate", "1e-3"],
    ],
)
def test_the_held_out_loss_falls(more, flags, tmp_path):
    result = instruct.main(flags(*more), folder())
    losses = result["held_out_losses"]
    assert [entry["step"] for entry in losses] == sorted({entry["step"] for entry in losses}) and len(losses) == 3
    assert losses[0]["step"] == 0 and losses[2]["loss"] < losses[0]["loss"]
    assert (result["train_rows"], result["held_out_rows"], result["rows_without_response"]) == (30, 6, 0)
    assert result == read_json(tmp_path / "run" / "training.json")
    before = (tmp_path / "run" / "training.json").stat().st_mtime_ns
    instruct.main(flags(*more), folder())  # finished: not run again
    assert (tmp_path / "run" / "training.json").stat().st_mtime_ns == before


def test_the_last_adapter_is_pushed_with_what_the_training_says(hub, flags, base, tmp_path):
    result = instruct.main(flags(*VBLORA, "--max_steps", "1", "--push_to_hub", "--hub_model_id", "someone/x"), folder())
    assert sum("/commit/" in asked for asked in hub.requests) == 1
    files = hub.files("someone/x")
    assert json.loads(files["training.json"]) == result == read_json(tmp_path / "run" / "training.json")
    assert json.loads(files["adapter_config.json"])["task_type"] == "CAUSAL_LM"
    assert str(tmp_path).encode() not in b"".join(files.values())
    vblora.load(AutoModelForCausalLM.from_pretrained(base), "someone/x", strict_base=True)


def test_packed_and_padded_training_see_the_same_first_loss(flags):
    """Of the same held-out rows, before any training."""
    padded = instruct.main(flags(*VBLORA, out="padded"), folder())
    packed = instruct.main(flags(*VBLORA, "--pack_length", "200", out="packed"), folder())
    assert packed["train_tokens"] == padded["train_tokens"] and packed["steps"] < padded["steps"]
    # The evaluation's loss is a mean over batches; with all rows in one batch it is that over tokens for both.
    more = ["--per_device_eval_batch_size", "6", "--max_steps", "1"]
    one = instruct.main(flags(*VBLORA, *more, out="one"), folder())["held_out_losses"][0]["loss"]
    two = instruct.main(flags(*VBLORA, *more, "--pack_length", "200", out="two"), folder())["held_out_losses"][0][
        "loss"
    ]
    assert two == pytest.approx(one, rel=1e-4)


class Stop(Exception):
    pass


class StopAfterFirstSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise Stop


@pytest.mark.parametrize("save", [[], ["--save_strategy", "steps", "--save_steps", "2"]], ids=["epoch", "steps"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(save, flags, tmp_path, monkeypatch):
    whole = instruct.main(flags(*VBLORA, *save, out="whole"), folder())
    original = instruct.AdapterTrainer

    def stopping(*arguments, **others):
        trainer = original(*arguments, **others)
        trainer.add_callback(StopAfterFirstSave())
        return trainer

    monkeypatch.setattr(instruct, "AdapterTrainer", stopping)
    with pytest.raises(Stop):
        instruct.main(flags(*VBLORA, *save, out="parts"), folder())
    monkeypatch.setattr(instruct, "AdapterTrainer", original)
    parts = instruct.main(flags(*VBLORA, *save, out="parts"), folder())
    assert parts["held_out_losses"] == whole["held_out_losses"]
    tensors = [read_tensors(tmp_path / name / "last" / "adapter_model.safetensors")[0] for name in ("whole", "parts")]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


def test_the_former_name_of_the_data_format_is_understood(flags, tmp_path):
    (tmp_path / "c.yaml").write_text("form: gsm8k\n")
    for more in (["--form", "gsm8k"], ["--config", str(tmp_path / "c.yaml")]):
        settings = folder().script().read(flags(*more))
        assert settings.of(instruct.InstructArguments).data_format == "gsm8k"
    assert not runs.differences({"form": "gsm8k", "seed": 1}, {"data_format": "gsm8k", "seed": 1})
    assert runs.differences({"form": "gsm8k"}, {"data_format": "alpaca"}) == ["data_format"]
    assert runs.differences({"form": "full"}, {"form": "topk"}) == ["form"]


def test_plan_without_the_models_configuration_shows_the_settings_alone(tmp_path, flags, capsys):
    nowhere = ["--model_name_or_path", str(tmp_path / "nowhere"), "--plan"]
    assert instruct.main([*flags(*VBLORA), *nowhere], folder()) == {}
    printed = capsys.readouterr().out
    assert "learning_rate_logits" in printed and "memory and time are not estimated: " in printed
    assert not (tmp_path / "run").exists()


def test_the_held_out_rows_are_the_same_for_every_seed(flags):
    rows = list(range(50))

    def divided(*more):
        run = instruct.parse(flags(*more), folder())
        return instruct.divide(rows, run.instruct, run.training)

    train, held = divided("--seed", "1")
    assert sorted([*train, *held]) == rows and len(held) == 6
    assert divided("--seed", "2") == (train, held)
    few, same = divided("--seed", "1", "--max_train_samples", "10")
    assert same == held and len(few) == 10 and set(few) < set(train)
    assert divided("--seed", "2", "--max_train_samples", "10")[0] != few
    assert divided("--data_seed", "7")[1] == held != divided("--held_out_seed", "7")[1]


def test_nothing_held_out_is_nothing_evaluated(flags):
    result = instruct.main(flags(*VBLORA, "--held_out", "0"), folder())
    assert result["held_out_losses"] == [] and result["train_rows"] == 36


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_quantised_base_on_the_cpu(bits, flags, tmp_path):
    """NF4 with double quantisation, and 8 bits: the loss falls, and the adapter goes on a base of 16 bits too."""
    pytest.importorskip("bitsandbytes")
    wide = save_tiny_llama(tmp_path / "wide", width=128)
    more = [*VBLORA, "--bits", bits, "--dtype", "float32", "--model_name_or_path", str(wide)]
    result = instruct.main(flags(*more), folder())
    losses = [entry["loss"] for entry in result["held_out_losses"]]
    assert losses[-1] < losses[0] and result["settings"]["bits"] == int(bits)
    model = models.load_model(str(wide))
    assert vblora.load(model, tmp_path / "run" / "last").stored_parameters().parameters > 0


@pytest.mark.parametrize("method", ["vblora", "lora", "vera", "lora_xs", "tied_lora", "full"])
def test_the_plan_counts_what_the_training_stores(method, flags, capsys):
    settings = {
        "vblora": VBLORA,
        "lora": ["--rank", "3"],
        "vera": ["--rank", "8"],
        "lora_xs": ["--rank", "4"],
        "tied_lora": ["--rank", "2"],
        "full": [],
    }[method]
    command = flags("--method", method, *settings)
    planned = instruct.main([*command, "--plan"], folder())
    assert "stored parameters" in capsys.readouterr().out
    trained = instruct.main([*command, "--max_steps", "1"], folder())
    assert planned["stored_parameters"] == trained["stored_parameters"]["parameters"]


def test_the_plan_of_llama2_7b_by_hand(tmp_path):
    """From its configuration: the paper's 7B run, against the numbers worked out here."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    )
    config.save_pretrained(tmp_path)
    command = ["--model_name_or_path", str(tmp_path), "--bits", "4", "--dtype", "bfloat16", "--rank", "4"]
    command += ["--num_vectors", "2048", "--vector_length", "256", "--gradient_checkpointing", "true", "--plan"]
    command += ["--per_device_train_batch_size", "4", "--use_cpu", "true"]
    found = instruct.main(command, folder())
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 2 * 32000 * 4096 + 65 * 4096
    assert found["model_parameters"] == linear + rest == 6_738_415_616
    assert found["stored_parameters"] == 582_848
    assert found["base_bytes"] == pytest.approx(linear * 4.127 / 8 + 2 * rest)
    slots, selected = 39_040 * 56, 39_040 * 2
    assert found["training_state_bytes"] == 16 * 2048 * 256 + 16 * slots + 24 * selected
    assert found["longest_batch_tokens"] == 4 * 1024
    assert found["operations_per_token"] == 6 * (linear + rest)
    lora = instruct.main([*command[:6], "--method", "lora", "--rank", "64", *command[12:]], folder())
    assert lora["stored_parameters"] == 159_907_840 and lora["training_state_bytes"] == 16 * 159_907_840
    assert "GiB" in estimate.describe(lora)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data_format", "vicuna"], "unknown data format 'vicuna'"),
        (["--data", "nonesuch.json"], r"nonesuch\.json: no such file"),
        (["--max_length", "100"], "--max_length does nothing with --data_format alpaca"),
        (["--source_max_length", "1"], "--source_max_length must be at least 2"),
        (["--bits", "3"], "--bits must be 16, 8 or 4, not 3"),
        (["--bits", "4", "--method", "full"], "quantised weights cannot be trained"),
        (["--dtype", "float99"], "--dtype float99 names no floating point type"),
        (["--held_out", "36"], "leaves nothing of 36 rows"),
        (["--held_out", "-1"], "--held_out must be at least 0"),
        (["--max_train_samples", "0"], "--max_train_samples must be at least 1"),
        (["--pack_length", "100"], "less than a row may have"),
        (["--pack_length", "200", "--use_cache", "true"], "takes joined rows for one"),
        (["--targets", "nonesuch"], "match no layer"),
        (["--optim", "paged_adamw_32bit"], "does not know VB-LoRA's logits"),
        (["--optim", "sgd"], "--optim sgd is not offered"),
        (["--held_out", "0", "--eval_strategy", "epoch"], "--eval_strategy does nothing without --held_out"),
        (["--num_train_epochs", "0"], "--num_train_epochs must be above 0"),
        (["--nonesuch", "1"], "nonesuch"),
    ],
)
def test_wrong_input_is_named(more, message, flags):
    sizes = () if "full" in more else VBLORA
    with pytest.raises(ValueError, match=message):
        instruct.main(flags(*sizes, *more), folder())


def test_bitsandbytes_adamw_trains_what_has_no_logits(flags):
    pytest.importorskip("bitsandbytes")
    result = instruct.main(flags("--row", "tiny/lora", "--optim", "paged_adamw_32bit"), folder())
    losses = [entry["loss"] for entry in result["held_out_losses"]]
    assert losses[-1] < losses[0]


def test_a_response_that_is_cut_away_leaves_the_row_out(base, tmp_path, flags):
    rows = [{"query": "q " * 60, "response": "r"}, {"query": "q", "response": "r"}, {"query": "p", "response": "r"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = ["--model_name_or_path", str(base), "--data", str(tmp_path / "rows.json"), "--form", "metamath"]
    command += ["--max_length", "150", "--output_dir", str(tmp_path / "run"), "--use_cpu", "true", *VBLORA]
    result = instruct.main([*command, "--disable_tqdm", "true"], folder())
    assert result["train_rows"] == 2 and result["rows_without_response"] == 1
    with pytest.raises(ValueError, match="no row has any of its response left"):
        instruct.main([*command, "--max_length", "20", "--output_dir", str(tmp_path / "none")], folder())


def test_a_model_whose_packed_rows_see_each_other_is_refused():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    model = OPTForCausalLM(OPTConfig(vocab_size=50, num_hidden_layers=2, init_std=0.5, **sizes))
    with pytest.raises(ValueError, match="OPTForCausalLM: joined rows would see each other"):
        causal.check_joining(model, 2)
    causal.check_joining(tiny_llama(50), 2)


def test_the_plan_of_a_papers_row_needs_no_gpu(flags, capsys):
    found = instruct.main([*flags(*VBLORA), "--bf16", "true", "--use_cpu", "false", "--plan"], folder())
    assert found["stored_parameters"] == 576 and "GiB" in capsys.readouterr().out
