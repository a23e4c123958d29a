"""On paper: how many GPUs a language model's training takes, by which strategy, and the memory of each.

    python benchmarks/training_memory.py [--rows 4] [--length 1024] [--record results/speed/training_memory.json]

The estimate is that of `--plan` (vblora_experiments/estimate.py), which tests hold to 15% of what small models are
measured to take. VB-LoRA r 4, h 2048, b 256, k 2 on all linear layers, bfloat16 or NF4, gradient checkpointing, so many
rows of so many tokens on each GPU at a time. A GPU is taken to have room where a fifth of it is left.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from turns import report, require_positive

from vblora.methods import VBLoRAConfig
from vblora.shapes import sub_vectors
from vblora.targets import find_targets, layer_shapes
from vblora_experiments import commands, estimate

# Width, gated product, blocks, heads, heads of keys, vocabulary; all are of Llama's kind as far as memory goes.
MODELS: dict[str, tuple[tuple[int, int, int, int, int, int], dict[str, Any]]] = {
    "SmolLM2-135M": ((576, 1536, 30, 9, 3, 49152), {"tie_word_embeddings": True}),
    "Llama2-7B": ((4096, 11008, 32, 32, 32, 32000), {}),
    "Mistral-7B": ((4096, 14336, 32, 32, 8, 32000), {}),
    "Gemma-7B": ((3072, 24576, 28, 16, 16, 256000), {"tie_word_embeddings": True, "head_dim": 256}),
    "Llama2-13B": ((5120, 13824, 40, 40, 40, 32000), {}),
    "Llama2-70B": ((8192, 28672, 80, 64, 8, 32000), {}),
}
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES = (24, 48, 80)  # GB of a GPU
ROOM = 0.8
SHARES = (1, 2, 4, 8)  # GPUs under FSDP2
CONFIG = VBLoRAConfig(r=4, num_vectors=2048, vector_length=256, topk=2, target_modules="all-linear")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="on each GPU at a time")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    require_positive(options, "rows", "length")
    tokens = options.rows * options.length
    results = {name: of_model(skeleton(*sizes), tokens) for name, sizes in MODELS.items()}
    shape = {"rows": options.rows, "length": options.length}
    report("training_memory", {**shape, "models": results}, render(results, tokens), options.record)


def skeleton(sizes: tuple[int, ...], more: dict[str, Any]) -> Any:
    """The model without memory."""
    config = LlamaConfig(**dict(zip((*NAMES, "vocab_size"), sizes, strict=True)), **more)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def of_model(model: Any, tokens: int) -> dict[str, Any]:
    """Bytes of each GPU by strategy, and what is recommended."""
    count = sub_vectors(layer_shapes(find_targets(model, CONFIG), CONFIG), CONFIG.r, CONFIG.vector_length)
    states, composed = estimate.vblora_bytes(count, CONFIG, 2)
    found: dict[int, dict[str, int]] = {}
    for bits in (4, 16):
        base = estimate.weight_bytes(model, bits, "bfloat16")
        found[bits] = estimate.memory(model, base, states, composed, tokens, True, 2, bits)
    divided = {str(n): estimate.divided(found[16], n) for n in SHARES}
    whole = found[4]["memory_bytes"]
    return {"ddp_nf4": whole, "fsdp2": divided, "parts": found[16], "advice": advice(whole, divided)}


def advice(nf4: int, divided: dict[str, int]) -> str:
    """The fewest and smallest GPUs that hold the weights in 16 bits, and those that hold them in NF4."""
    said = []
    fits = [(int(n), size) for n, held in divided.items() for size in SIZES if held <= ROOM * size * 1e9]
    if fits:
        n, size = fits[0]
        said.append(f"bfloat16: one of {size} GB" if n == 1 else f"bfloat16: FSDP2 over {n} of {size} GB")
    small = [size for size in SIZES if nf4 <= ROOM * size * 1e9]
    said.append(f"NF4: one of {small[0]} GB" if small else "NF4: does not fit one")
    return "; ".join(said)


def render(results: dict[str, Any], tokens: int) -> str:
    columns = " | ".join(f"FSDP2 over {n}" if n > 1 else "DDP or one" for n in SHARES)
    lines = [f"| GB on each GPU | NF4, DDP or one | bfloat16: {columns} | at least |"]
    lines.append(f"|---|---:|{'---:|' * len(SHARES)}---|")
    for name, found in results.items():
        held = [found["ddp_nf4"], *(found["fsdp2"][str(n)] for n in SHARES)]
        lines.append(f"| {name} | {' | '.join(f'{size / 1e9:.1f}' for size in held)} | {found['advice']} |")
    return "\n".join([*lines, "", f"{tokens:,} tokens on each GPU at a time, with gradient checkpointing."])


if __name__ == "__main__":
    commands.run(main, "training_memory")
