"""Training and decoding on generated restaurants with a tiny GPT-2 and a tiny Llama."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    NoRepeatNGramLogitsProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import causal_text
import decode
import generation
import train
from causal_text import prompts
from e2e_data import Example, group, load_split
from vblora import models
from vblora.io import read_json, read_tensors
from vblora.models import load_tokenizer
from vblora_experiments import causal

METHODS = {
    "vblora": ["--num_vectors", "12", "--vector_length", "16", "--topk", "2"],
    "vblora_recipe": ["--recipe", "--recipe_lora_rate", "5e-3", "--vector_length", "16"],
    "tied_lora": ["--rank", "2", "--targets", "qv"],
    "lora": ["--rank", "2", "--lora_alpha", "2", "--targets", "qv"],
    "full": [],
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_train_and_decode(kind, method, flags, models_by_kind, restaurants, tmp_path):
    result = train.main(flags(kind, "--method", method.removesuffix("_recipe"), *METHODS[method]))
    assert ("recipe" in result) == ("--recipe" in METHODS[method])
    assert len(result["validation_losses"]) == 2 and result["train_rows"] == 48
    assert result["validation_losses"][1] < result["validation_losses"][0]
    command = [str(tmp_path / "run"), "--data_dir", str(restaurants), "--beam", "3", "--max_new_tokens", "12"]
    command += ["--model_name_or_path", str(models_by_kind[kind]), "--batch_size", "4"]
    path = decode.main(command)
    texts = path.read_text().split("\n")[:-1]
    groups = group(load_split("e2e", "test", restaurants))
    assert len(texts) == len(groups) == 6
    shown = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [entry["source"] for entry in shown] == [g.source for g in groups]
    assert [entry["text"] for entry in shown] == texts
    if method != "full":
        path.unlink()
        assert decode.main([*command, "--merge"]).read_text().split("\n")[:-1] == texts


def test_gpt2s_fused_layer_is_adapted_as_q_k_and_v_unless_told_otherwise(flags, tmp_path):
    apart = train.main(flags("gpt2", *METHODS["vblora"], out=tmp_path / "apart"))
    whole = train.main(flags("gpt2", *METHODS["vblora"], "--split_fused", "false", out=tmp_path / "whole"))
    assert apart["adapter_settings"]["split_modules"] == {"c_attn": ["q", "k", "v"]}
    assert whole["adapter_settings"]["split_modules"] is None
    # r 4, b 16, width 32: 16 sub-vectors more per block, for A of two further layers; 1.5 parameters each.
    assert apart["stored_parameters"]["parameters"] - whole["stored_parameters"]["parameters"] == 2 * 16 * 1.5
    qv = train.main(flags("gpt2", *METHODS["vblora"], "--targets", "qv", out=tmp_path / "qv"))
    assert qv["adapter_settings"]["exclude_modules"] == ["c_attn.k"]


def test_the_loss_is_over_the_reference_and_the_end(models_by_kind):
    tokenizer = models.load_tokenizer(str(models_by_kind["gpt2"]))
    (row,) = causal_text.encode([Example("name : Luna", "Luna is a pub.")], tokenizer, 100)
    labelled = [token for token, label in zip(*row, strict=True) if label != -100]
    assert tokenizer.decode(labelled) == " Luna is a pub.<|endoftext|>"
    assert tokenizer.decode(row.input_ids) == "name : Luna<|endoftext|> Luna is a pub.<|endoftext|>"
    assert all(label in (-100, token) for token, label in zip(*row, strict=True))
    (short,) = causal_text.encode([Example("name : Luna", "Luna is a pub.")], tokenizer, len(row.input_ids) - 2)
    assert len(short.input_ids) == len(short.labels) == len(row.input_ids) - 2
    with pytest.raises(ValueError, match="--max_length 5 leaves nothing of the reference of 1 rows"):
        causal_text.encode([Example("name : Luna", "Luna is a pub.")], tokenizer, 5)


def test_label_smoothing_counts_reference_tokens_alone(models_by_kind, restaurants, tmp_path):
    """Trainer's smoothed loss, against the definition."""
    training = TrainingArguments(str(tmp_path), label_smoothing_factor=train.DEFAULTS["label_smoothing_factor"])
    name = str(models_by_kind["gpt2"])
    model, tokenizer = models.load_model(name), models.load_tokenizer(name)
    rows = causal.EncodedRows(causal_text.encode(load_split("e2e", "train", restaurants)[:2], tokenizer, 512))
    batch = causal.Padded(tokenizer.pad_token_id)([rows[0], rows[1]])
    trainer = Trainer(model=model.eval(), args=training)
    loss = trainer.compute_loss(model, dict(batch))
    with torch.no_grad():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logs = model(**inputs).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    hit = logs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[counted]
    expected = -(0.9 * hit + 0.1 * logs.mean(-1)[counted]).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)


class Stop(Exception):
    pass


class StopAfterFirstSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise Stop


@pytest.mark.parametrize("method", ["vblora", "lora"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(method, flags, tmp_path, monkeypatch):
    command = ["--method", method, *METHODS[method], "--gradient_accumulation_steps", "2"]
    whole = train.main(flags("gpt2", *command, out=tmp_path / "whole"))
    original = train.AdapterTrainer

    def stopping(*arguments, **others):
        trainer = original(*arguments, **others)
        trainer.add_callback(StopAfterFirstSave())
        return trainer

    monkeypatch.setattr(train, "AdapterTrainer", stopping)
    with pytest.raises(Stop):
        train.main(flags("gpt2", *command, out=tmp_path / "parts"))
    monkeypatch.setattr(train, "AdapterTrainer", original)
    parts = train.main(flags("gpt2", *command, out=tmp_path / "parts"))
    assert parts["validation_losses"] == whole["validation_losses"]
    tensors = [read_tensors(tmp_path / name / "last" / "adapter_model.safetensors")[0] for name in ("whole", "parts")]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    before = (tmp_path / "parts" / "training.json").stat().st_mtime_ns
    train.main(flags("gpt2", *command, out=tmp_path / "parts"))  # finished: not run again
    assert (tmp_path / "parts" / "training.json").stat().st_mtime_ns == before


def test_an_interrupted_decoding_goes_on_to_the_same_texts(flags, models_by_kind, restaurants, tmp_path, monkeypatch):
    train.main(flags("gpt2", *METHODS["vblora"]))
    command = [str(tmp_path / "run"), "--data_dir", str(restaurants), "--beam", "2", "--max_new_tokens", "8"]
    command += ["--model_name_or_path", str(models_by_kind["gpt2"]), "--batch_size", "2"]
    whole = decode.main(command).read_text()
    (tmp_path / "run" / "test.txt").unlink()
    original, calls = decode.Progress.add, []

    def failing(self, texts):
        original(self, texts)
        calls.append(texts)
        raise Stop

    monkeypatch.setattr(decode.Progress, "add", failing)
    with pytest.raises(Stop):
        decode.main(command)
    assert len(calls) == 1 and not (tmp_path / "run" / "test.txt").exists()
    with (tmp_path / "run" / "test.partial.jsonl").open("a") as file:
        file.write('{"number": 5, "te')  # as after a power cut
    seen = []
    monkeypatch.setattr(decode.Progress, "add", lambda self, texts: (seen.append(texts), original(self, texts)))
    assert decode.main(command).read_text() == whole
    assert len(seen) == 2 and not (tmp_path / "run" / "test.partial.jsonl").exists()
    for name in ("test.txt", "test.decoding.json"):
        (tmp_path / "run" / name).unlink()
    kept = (tmp_path / "run" / "test.jsonl").read_text()
    with pytest.raises(ValueError, match=r"test\.jsonl was not written by this command, .*: move it away first"):
        decode.main(command)
    assert (tmp_path / "run" / "test.jsonl").read_text() == kept


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prompts_read_once_give_the_texts_of_prompts_read_for_every_beam(kind, models_by_kind, monkeypatch):
    tokenizer = load_tokenizer(str(models_by_kind[kind]))
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(models_by_kind[kind]).eval()
    with torch.no_grad():  # further from uniform, so that rounding decides nothing
        for parameter in model.parameters():
            parameter.mul_(3)
    encoded = prompts(["name : The Eagle", "name : Zizzi | food : Italian | area : riverside", "x"], tokenizer)
    decoding = generation.Decoding(beam=4, max_new_tokens=10)
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, a, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True)
    once = generation.generate(model, tokenizer, encoded, decoding)
    tokens_once, read[:] = sum(read), []
    monkeypatch.setattr(generation, "_read_once", lambda *_: None)
    assert once == generation.generate(model, tokenizer, encoded, decoding)
    width = max(map(len, encoded))
    assert sum(read) - tokens_once == 3 * (width - 1) * (decoding.beam - 1)


def test_four_grams_of_the_source_may_be_said():
    prompt, text = [7, 8, 9, 4], [7, 8, 9]
    ids, scores = torch.tensor([prompt + text]), torch.zeros(1, 12)
    assert torch.isinf(NoRepeatNGramLogitsProcessor(4)(ids, scores.clone())[0, 4])
    assert not torch.isinf(generation.NoRepeatAfter(4, len(prompt))(ids, scores.clone())).any()
    again = torch.tensor([[*prompt, 1, 2, 3, 5, 1, 2, 3]])
    assert torch.isinf(generation.NoRepeatAfter(4, len(prompt))(again, scores.clone())[0, 5])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--dataset", "dart"], "unknown data set 'dart'"),
        (["--data_dir", "nonesuch"], "nonesuch: no such folder"),
        (["--max_length", "2"], "--max_length must be at least 8"),
        (["--max_train_samples", "0"], "--max_train_samples must be at least 1"),
        (["--targets", "nonesuch"], "match no layer"),
        (["--method", "lora", "--topk", "2"], "--topk does nothing with --method lora"),
    ],
)
def test_wrong_input_to_training_is_named(wrong, message, flags):
    with pytest.raises(ValueError, match=message):
        train.main(flags("gpt2", *wrong))


def test_wrong_input_to_decoding_is_named(flags, models_by_kind, restaurants, tmp_path):
    with pytest.raises(ValueError, match="holds no run of train"):
        decode.main([str(tmp_path)])
    train.main(flags("gpt2", *METHODS["vblora"]))
    run, data = str(tmp_path / "run"), ["--data_dir", str(restaurants)]
    with pytest.raises(ValueError, match="name its folder with --model_name_or_path"):
        decode.main([run, *data])
    with pytest.raises(ValueError, match="is not the model that the run"):
        decode.main([run, *data, "--model_name_or_path", str(models_by_kind["llama"])])
    with pytest.raises(ValueError, match="--beam must be at least 1"):
        decode.main([run, *data, "--beam", "0"])
    (tmp_path / "run" / "training.json").unlink()
    with pytest.raises(ValueError, match="holds no finished run"):
        decode.main([run, *data])
    assert read_json(tmp_path / "run" / "run.json")["dataset"] == "e2e"
