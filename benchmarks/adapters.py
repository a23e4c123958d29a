"""The same adapter in each of the forms that benchmarks compare: ours, and PEFT's VB-LoRA and LoRA, read from files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from step_time import DECODER
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import vblora

TOPK, PACKED, LORA = "topk", "packed.safetensors", "lora"  # what `write` leaves in an adapter's folder


def llama(width: int, layers: int, vocabulary: int = 1000) -> Any:
    """A Llama with random weights, 64 wide in each head, in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=-(-width * 8 // 3 // 256) * 256,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def write(model: Any, folder: Path, seed: int = 0, num_vectors: int = 2048) -> None:
    """One VB-LoRA adapter of all linear layers (r 4, k 2) as a top-k directory, a packed file and exact LoRA.

    The bank is wide enough for the adapter to be seen in the outputs.
    """
    width = next(b for b in (256, 64, 32) if model.config.hidden_size % b == 0)  # PEFT's layers are whole vectors
    config = vblora.VBLoRAConfig(
        r=4,
        num_vectors=num_vectors,
        vector_length=width,
        topk=2,
        init_vector_bank_bound=0.2,
        target_modules=DECODER,
    )
    adapter = vblora.attach(model, config, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    adapter.save(str(folder / TOPK))
    adapter.pack(str(folder / PACKED))
    adapter.export_lora(str(folder / LORA))
    adapter.detach()


def with_peft(model: nn.Module, directory: Path, name: str = "default") -> Any:
    """A copy of the model with PEFT's adapter from a directory."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(directory), adapter_name=name).eval()
