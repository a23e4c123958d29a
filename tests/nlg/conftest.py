"""Puts NLG/ on the path, as `python NLG/score.py` does; generated restaurants, tiny models, and the real data."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "NLG"))


@pytest.fixture
def real_data():
    """A function from a folder name to that folder of real data; skips where it is missing."""
    base = Path(os.environ.get("VBLORA_DATA") or ROOT.parent / "shared" / "data")

    def folder(name: str) -> Path:
        if not (base / name).is_dir():
            pytest.skip(f"real data {name!r} is not in {base} (set VBLORA_DATA to its place)")
        return base / name

    return folder


@pytest.fixture
def java():
    """Skips where METEOR, ROUGE_L and CIDEr cannot be computed."""
    import e2e_scores

    if lacking := e2e_scores.why_no_caption_scores():
        pytest.skip(f"METEOR, ROUGE_L and CIDEr: {lacking}")


@pytest.fixture
def no_java(monkeypatch):
    import e2e_scores

    monkeypatch.setattr(e2e_scores, "why_no_caption_scores", lambda: "they need Java")


@pytest.fixture(scope="session")
def restaurants(tmp_path_factory):
    import generate_e2e

    folder = tmp_path_factory.mktemp("restaurants")
    generate_e2e.write(folder, 48, 6, 6, seed=0)
    return folder


@pytest.fixture(scope="session")
def models_by_kind(tmp_path_factory, restaurants):
    """A GPT-2 (fused Conv1D) and a Llama (separate Linear), 32 wide, with a byte-level vocabulary of the data."""
    from e2e_data import load_split

    examples = load_split("e2e", "train", restaurants)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [text for example in examples for text in example],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=special[0])
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    made = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, **size)),
        "llama": LlamaForCausalLM(
            LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **size)
        ),
    }
    folders = {}
    for kind, model in made.items():
        folders[kind] = tmp_path_factory.mktemp("models") / kind
        model.save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture
def flags(models_by_kind, restaurants, tmp_path):
    def make(kind="gpt2", *more, out=None):
        places = ["--model_name_or_path", str(models_by_kind[kind]), "--data_dir", str(restaurants)]
        small = ["--num_train_epochs", "2", "--learning_rate", "1e-2", "--warmup_steps", "0", "--use_cpu", "true"]
        return [*places, *small, "--disable_tqdm", "true", "--output_dir", str(out or tmp_path / "run"), *more]

    return make
