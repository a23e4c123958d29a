"""A tiny Llama with a tokenizer, for the tests of instruction tuning."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = ["Below is an instruction that describes a task. ### Instruction: ### Response: ### Input: Name a colour."]


def byte_tokenizer(texts: list[str] | None = None, ascii_alone: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a first, an end and a padding token. With ASCII alone every sequence of tokens is a text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if not ascii_alone or c.isascii() or c in "ĠĊ"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts or TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_llama(vocabulary: int, width: int = 32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def save_tiny_llama(folder: Path, width: int = 32, ascii_alone: bool = False) -> Path:
    """A folder with the model and its tokenizer."""
    tokenizer = byte_tokenizer(ascii_alone=ascii_alone)
    tiny_llama(len(tokenizer), width).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def vllm_environment() -> Path:
    """The environment that has the real vLLM; the test is skipped where there is none."""
    given = os.environ.get("VBLORA_VLLM_VENV")
    own = Path(__file__).resolve().parents[1] / ".venv-vllm"
    if given is None and find_spec("vllm") is None and not (own / "installed").exists():
        pytest.skip("vLLM is not installed: run scripts/serve_demo.sh, or name its environment with VBLORA_VLLM_VENV")
    return Path(given or (sys.prefix if find_spec("vllm") is not None else own))
