"""The quick start's parts: the encoder's check, the table, the picture. It is run whole by scripts/quickstart.sh."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

import encoders
import generate_cola
import quickstart
import table
import vblora

RECORD = {
    "experiment": "glue",
    "task": "cola",
    "method": "vblora",
    "scores": {
        "metric": "matthews_correlation",
        "epochs": [{"epoch": 0, "matthews_correlation": 0.01}, {"epoch": 1.0, "matthews_correlation": 0.7}],
        "last": {"epoch": 2.0, "matthews_correlation": 0.6},
        "best": {"epoch": 1.0, "matthews_correlation": 0.7},
    },
    "stored_parameters": {"parameters": 13464, "bytes": 53856},
    "bytes_on_disk": 78560,
    "train_seconds": 123.4,
}


def test_the_encoder_is_in_its_package_with_the_expected_weights():
    assert (encoders.find_encoder() / "model.safetensors").is_file()


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(encoders, "ENCODER_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"has SHA-256 53aa51172d.* expected 0000"):
        encoders.find_encoder()


def test_the_table_has_the_untrained_head_and_each_method():
    lora = copy.deepcopy(RECORD) | {"method": "lora", "train_seconds": 99.6}
    text = quickstart.table({"vblora": RECORD, "lora": lora}, 0.024)
    assert "| untrained head | | | | 0.010 | |" in text
    assert "| bag of words (logistic regression) | | | | 0.024 | |" in text
    assert "| VB-LoRA | 13,464 | 53,856 | 78,560 | 0.600 (0.700) | 123 s |" in text
    assert "| LoRA | 13,464 | 53,856 | 78,560 | 0.600 (0.700) | 100 s |" in text


def test_a_bag_of_words_gets_little_on_the_quick_starts_sentences(tmp_path):
    generate_cola.write(tmp_path, 2000, 500, 0, quickstart.PHENOMENA)
    assert abs(quickstart.bag_of_words(tmp_path)) < 0.1


def test_the_picture_shows_shares_that_sum_to_one_for_each_factor(tmp_path):
    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    )
    config = vblora.VBLoRAConfig(r=2, num_vectors=10, vector_length=16, target_modules=["query", "value"])
    vblora.attach(model, config).save(tmp_path / "adapter")
    names, shares = quickstart.selection_shares(tmp_path / "adapter")
    assert shares.shape == (2 * 2 * 3, 10) and shares.sum(axis=1) == pytest.approx(1.0)
    assert [quickstart.block_of(name) for name in names] == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
    quickstart.picture({"vblora": RECORD}, tmp_path / "adapter", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_records_become_a_table_most_parameters_first():
    full = copy.deepcopy(RECORD) | {"method": "full", "stored_parameters": {"parameters": 22_000_000, "bytes": 88}}
    lines = table.render(sorted([RECORD, full], key=lambda r: -r["stored_parameters"]["parameters"])).splitlines()
    assert lines[2].startswith("| cola (Matthews) | full fine-tuning | 22,000,000 |")
    assert lines[3].startswith("| cola (Matthews) | VB-LoRA | 13,464 | 53,856 | 0.600 | 0.700 | 2 |")


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run record"):
        table.read([tmp_path])


def test_the_longer_runs_table_is_made_from_the_records():
    folder = Path(quickstart.ROOT) / "results" / "cola_minilm"
    assert table.render(table.read([folder])) in (folder / "README.md").read_text()
