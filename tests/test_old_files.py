"""Files that version 0.1 wrote are read, and give the outputs that they gave: `files_of_version_0_1/`.

They were made with the tiny models of core_helpers.py; expected.json holds the first outputs of each model.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from core_helpers import build, make_batch, run

import vblora
from vblora.adapter import restore
from vblora.files import packed

OLD = Path(__file__).parent / "files_of_version_0_1"
EXPECTED = json.loads((OLD / "expected.json").read_text())
LLAMA = ("vblora_native", "small.", "shared.", "selection_full", "checkpoint")


def kind_of(name):
    if name.startswith("split"):
        return "gpt2"
    return "llama" if name == "lora" or name.startswith(LLAMA) else "bert"


def outputs(model, kind):
    model.eval()
    with torch.no_grad():
        return run(model, make_batch(kind, rows=1, length=3)).flatten()[:12]


def require(model, name):
    torch.testing.assert_close(outputs(model, kind_of(name)), torch.tensor(EXPECTED[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in ("lora", "checkpoint")])
def test_an_adapter_of_version_0_1_loads(name):
    model = build(kind_of(name), hidden=16, layers=1)
    vblora.load(model, OLD / name)
    require(model, name)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.endswith(".safetensors")])
def test_a_packed_file_of_version_0_1_is_served(name, tmp_path):
    assert packed.read(OLD / name).factor_bytes > 0
    model = build(kind_of(name), hidden=16, layers=1)
    if name.startswith("lora_xs"):
        return  # its factors follow from the base model's weights, so that it is loaded and not served
    store = vblora.AdapterStore(model, OLD)
    with store.rows([name.removesuffix(".vblora.safetensors")]):
        require(model, name)


def test_plain_lora_of_version_0_1_is_pefts():
    model = peft.PeftModel.from_pretrained(build("llama", hidden=16, layers=1), str(OLD / "lora"))
    require(model, "lora")


def test_training_goes_on_from_a_checkpoint_of_version_0_1():
    model = build("llama", hidden=16, layers=1)
    adapter = vblora.load(model, OLD / "checkpoint")
    restore(adapter, OLD / "checkpoint")
    optimizer = vblora.AdamW(vblora.param_groups(model, lr=1e-2, lr_vector_bank=1e-2, lr_logits=0.5))
    optimizer.load_state_dict(torch.load(OLD / "checkpoint" / "optimizer.pt", weights_only=True))
    batch = make_batch("llama")
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    require(model, "checkpoint")
