"""Encoders whose checkpoint lacks something, or has another task's head."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import run_glue
from encoders import load_classifier, require_positions
from vblora import models
from vblora.io import read_tensors

BERT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
}
FLAG = "--model_name_or_path DIR"


def test_modules_that_the_checkpoint_lacks_are_named_and_saved_with_the_head(encoder, data, tmp_path, capsys):
    vocabulary = len(json.loads((encoder / "tokenizer.json").read_text())["model"]["vocab"])
    base = tmp_path / "base"
    config = DistilBertConfig(vocab_size=vocabulary, dim=16, hidden_dim=16, n_layers=1, n_heads=2)
    DistilBertModel(config).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text((encoder / name).read_text())
    places = ["--model_name_or_path", str(base), "--data_dir", str(data), "--task", "cola"]
    sizes = ["--targets", ".*(q_lin|v_lin)", "--rank", "2", "--num_vectors", "10", "--vector_length", "8"]
    small = ["--num_train_epochs", "1", "--learning_rate", "4e-3", "--disable_tqdm", "true", "--use_cpu", "true"]
    run_glue.main([*places, *sizes, *small, "--max_train_samples", "32", "--output_dir", str(tmp_path / "run")])
    assert f"{base} has no weights for pre_classifier: new, and trained and saved" in capsys.readouterr().out
    tensors, _ = read_tensors(tmp_path / "run" / "last" / "adapter_model.safetensors")
    assert {name for name in tensors if "pre_classifier" in name} == {
        "base_model.model.pre_classifier.weight",
        "base_model.model.pre_classifier.bias",
    }


def test_another_tasks_head_is_replaced_and_the_encoder_kept(tmp_path):
    base = BertForSequenceClassification(BertConfig(**BERT, num_labels=3))
    base.save_pretrained(tmp_path)
    model, new = load_classifier(str(tmp_path), 2, ["classifier"], FLAG)
    assert new == [] and model.classifier.weight.shape == (2, 16)
    assert torch.equal(model.bert.pooler.dense.weight, base.bert.pooler.dense.weight)


def test_an_encoder_of_other_widths_is_refused(tmp_path):
    BertForSequenceClassification(BertConfig(**BERT)).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "vocab_size": 21}))
    with pytest.raises(ValueError, match=r"word_embeddings\.weight is \(20, 16\) in the checkpoint, and \(21, 16\)"):
        load_classifier(str(tmp_path), 2, ["classifier"], FLAG)


@pytest.mark.parametrize(
    ("model", "most"),
    [
        (lambda: BertForSequenceClassification(BertConfig(**BERT)), 40),
        (lambda: RobertaForSequenceClassification(RobertaConfig(**BERT, pad_token_id=1)), 38),
    ],
)
def test_rows_longer_than_the_models_positions_are_refused(model, most):
    model = model()
    model(torch.full((1, most), 5))
    require_positions(model, most)
    with pytest.raises(
        ValueError, match=rf"rows of {most + 1} tokens, and the model has {most} positions: give --max_length"
    ):
        require_positions(model, most + 1)


def test_a_language_model_without_its_output_layer_is_refused(tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=False)
    LlamaModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for lm_head\.weight: they would be random numbers"):
        models.load_model(str(tmp_path))
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert models.load_model(str(tmp_path)).lm_head.weight.shape == (20, 16)
