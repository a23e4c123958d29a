"""What a run would store, hold in memory and take, from the model's configuration alone: no weights are loaded.

The memory is that of one device which holds the whole model, or its share of it under FSDP2. Tests hold it to measured
peaks of small models (tests/test_estimate.py); what the allocator and libraries take comes on top.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from vblora import models
from vblora.counts import METHODS, count_full
from vblora.hub import from_hub
from vblora.methods import VBLoRAConfig
from vblora.methods.through_peft import peft_config
from vblora.shapes import Count, sub_vectors
from vblora.switch import OWN_METHODS, own_config
from vblora.targets import find_targets, is_linear, layer_shapes
from vblora_experiments.instruction_data import DATA_FORMATS

GIB = 2**30
FOUR_BIT = (4 + 0.127) / 8  # bytes of a weight: NF4, and its block scales double quantised (QLoRA, section 3)
STATE = 16  # bytes of a trained parameter: itself, its gradient and AdamW's two moments, in float32
SLOTS = 56  # of a sub-vector's logits (vblora/logits.py): as many as benchmarks/active_logits.py has seen needed
FIELDS = ("r", "num_vectors", "vector_length", "topk")  # of VB-LoRA; the other methods' counts go by r alone
QV = ["q_proj", "v_proj"]  # of Llama, Mistral and Gemma


def of_run(model: Any, instruct: Any, method: Any, training: TrainingArguments) -> dict[str, Any]:
    """The estimates of one run, by name; `model` is its `skeleton`.

    Raises:
        ValueError: the method does not fit the model.
    """
    total = sum(p.numel() for p in model.parameters())
    full = method.method == "full"  # its weights are among what is trained
    base = 0 if full else weight_bytes(model, instruct.bits, instruct.dtype)
    size = precision(model, instruct.dtype).itemsize
    stored, states, composed = adapter_sizes(model, instruct, method, size)
    limits = instruct.limits()
    length = limits.total if DATA_FORMATS[instruct.data_format].together else limits.source + limits.target
    length = instruct.pack_length or length
    tokens = length * training.per_device_train_batch_size
    flops = operations(total, full, training.gradient_checkpointing)
    return {
        "model": instruct.model_name_or_path,
        "model_parameters": total,
        "stored_parameters": None if stored is None else stored.parameters,
        "stored_bytes": None if stored is None else stored.bytes,
        **memory(model, base, states, composed, tokens, training.gradient_checkpointing, size, instruct.bits),
        "longest_batch_tokens": tokens,
        "operations_per_token": flops,
        "tflops": instruct.tflops,
        "tokens_per_second": instruct.tflops * 1e12 / flops,
    }


def memory(
    model: Any, base: int, states: int, composed: int, tokens: int, checkpointing: bool, size: int, bits: int = 16
) -> dict[str, int]:
    """The bytes of a step by what they are for, and together.

    Args:
        model: its skeleton.
        base: bytes of the frozen weights.
        states: bytes of what is trained, with gradients and moments.
        composed: bytes of the factors that are made once in a step.
        tokens: of a batch on a device.
        size: bytes of a number that is computed with.
        bits: of the weights; below 16, one layer at a time is dequantised.
    """
    kept, working = activation_bytes(model, tokens, checkpointing, size)
    head = model.get_output_embeddings()
    linear = [m.weight.numel() for m in model.modules() if is_linear(m) and m is not head]
    working += max(linear, default=0) * size if bits < 16 else 0
    outputs = tokens * model.config.vocab_size * (8 + size + (4 if size < 4 else 0))
    # FSDP2 gathers all weights of a block, those of the next one meanwhile, and has a buffer for them; what is in no
    # block, embeddings and head, it keeps throughout.
    blocks, rest = model.config.num_hidden_layers, sum(p.numel() for p in model.parameters()) - sum(linear)
    gathered = (3 * sum(linear) // blocks + rest) * size if bits == 16 else 0
    parts = {
        "base_bytes": base,
        "training_state_bytes": states,
        "factor_bytes": composed,
        "activation_bytes": kept,
        # The vocabulary's outputs, their logarithms and gradient in float32, are gone when the first block is gone back
        # through.
        "working_bytes": max(working, outputs),
    }
    return {**parts, "memory_bytes": sum(parts.values()), "gathered_bytes": gathered}


def divided(estimates: dict[str, Any], devices: int) -> int:
    """The bytes that each of several devices needs under FSDP2, which divides the frozen weights and nothing else."""
    if devices == 1:
        return int(estimates["memory_bytes"])
    rest = estimates["memory_bytes"] - estimates["base_bytes"]
    return int(rest + -(-estimates["base_bytes"] // devices) + estimates["gathered_bytes"])


def skeleton(name: str) -> Any:
    """The model of this name, without memory for its weights.

    Raises:
        ValueError: its configuration cannot be had.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = from_hub(lambda: AutoConfig.from_pretrained(name), name, models.FLAG)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def precision(model: Any, dtype: str) -> torch.dtype:
    """Of the weights that are not quantised."""
    kept = getattr(model.config, "dtype", None) if dtype == "auto" else models.torch_dtype(dtype)
    return kept if isinstance(kept, torch.dtype) else torch.float32


def weight_bytes(model: Any, bits: int, dtype: str) -> int:
    """Of the base model: its linear layers but the output layer in `bits`, the rest in `dtype`."""
    size = precision(model, dtype).itemsize
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if is_linear(m) and m is not head)
    rest = sum(p.numel() for p in model.parameters()) - linear
    per_weight = {16: size, 8: 1, 4: FOUR_BIT}[bits]
    return round(linear * per_weight + rest * size)


def adapter_sizes(model: Any, instruct: Any, method: Any, size: int) -> tuple[Count | None, int, int]:
    """What is stored, the bytes of all that is trained, with gradients and AdamW's moments, and those of its factors.

    None and 0 for a method that has no counting rule here; `size` as in `memory`.
    """
    if method.method == "full":
        parameters = sum(p.numel() for p in model.parameters())
        return count_full(parameters), STATE * parameters, 0
    settings = method.settings(target_modules(instruct.targets), None)
    if method.method in OWN_METHODS:
        config: Any = own_config(model, method.method, settings)[0]
        where = config
    else:
        config = peft_config(method.method, settings)
        where = VBLoRAConfig(target_modules=settings["target_modules"])
    shapes = layer_shapes(find_targets(model, where), where)
    if method.method not in METHODS:
        return None, 0, 0
    fields = FIELDS if method.method == "vblora" else FIELDS[:1]
    stored = METHODS[method.method](shapes, **{name: getattr(config, name) for name in fields})
    if method.method != "vblora":
        return stored, STATE * stored.parameters, 0
    # Logits, two moments and an index of the entries in the table (vblora/logits.py); of the selected ones also a
    # value and a gradient of their own, and two indices of eight bytes.
    count = sub_vectors(shapes, config.r, config.vector_length)
    return stored, *vblora_bytes(count, config, size)


def vblora_bytes(count: int, config: VBLoRAConfig, size: int) -> tuple[int, int]:
    """Of VB-LoRA with so many sub-vectors: of what is trained, and of the sub-vectors as they are composed, in float32
    and rounded."""
    table, selected = count * min(SLOTS, config.num_vectors), count * config.topk
    state = STATE * config.num_vectors * config.vector_length + 16 * table + 24 * selected
    return state, count * config.vector_length * (4 + (size if size < 4 else 0))


def target_modules(targets: str) -> Any:
    """What `targets` names: "all" is every linear layer but the output layer; else a regular expression."""
    return {"all": "all-linear", "qv": QV}.get(targets, targets)


def activation_bytes(model: Any, tokens: int, checkpointing: bool, size: int) -> tuple[int, int]:
    """Of one batch: what is kept until the backward pass comes to it, and what that works with at a time.

    A block of Llama's kind with frozen weights keeps for each token the inputs of the adapted layers, what fused
    attention and the gated product need, and two norms' inputs in float32; with checkpointing its input alone, and one
    block at a time is computed again. The backward pass through a block works with gradients of the gated product's two
    factors and of its input:

        kept = size (2 h + 5 a + 4 i) + 8 h,    worked with = size (2 i + h)

    for the width h, that of all heads a, and that of the gated product i.
    """
    config = model.config
    h, blocks = config.hidden_size, config.num_hidden_layers
    a = config.num_attention_heads * (getattr(config, "head_dim", None) or h // config.num_attention_heads)
    i = getattr(config, "intermediate_size", None) or 4 * h
    block, working = tokens * (size * (2 * h + 5 * a + 4 * i) + 8 * h), tokens * size * (2 * i + h)
    return (blocks * size * tokens * h, block + working) if checkpointing else (blocks * block, working)


def operations(parameters: int, full: bool, checkpointing: bool) -> int:
    """Floating point operations of a token's step: 2 per weight forward, 2 backward to the input, 2 to the weight.

    A frozen weight has no gradient of its own; checkpointing does the forward pass twice.
    """
    return parameters * (2 + 2 + (2 if full else 0) + (2 if checkpointing else 0))


def describe(estimates: dict[str, Any]) -> str:
    """The estimates for reading."""

    def gib(name: str) -> str:
        return f"{estimates[name] / GIB:.2f} GiB"

    stored = estimates["stored_parameters"]
    count = "unknown for this method" if stored is None else f"{stored:,} ({estimates['stored_bytes']:,} bytes)"
    each = ", ".join(f"{divided(estimates, n) / GIB:.2f} GiB on each of {n}" for n in (2, 4, 8))
    shares = [f"  divided by FSDP2    {each}"] if estimates["gathered_bytes"] else []
    return "\n".join(
        [
            f"{estimates['model']}: {estimates['model_parameters']:,} parameters",
            f"stored parameters     {count}",
            f"memory, about         {gib('memory_bytes')} at the longest batch ({estimates['longest_batch_tokens']:,} "
            "tokens):",
            f"  base model          {gib('base_bytes')}",
            f"  trained, with AdamW {gib('training_state_bytes')}",
            f"  factors             {gib('factor_bytes')}",
            f"  activations         {gib('activation_bytes')}",
            f"  worked with         {gib('working_bytes')}",
            *shares,
            f"time, about           {1e6 / estimates['tokens_per_second'] / 60:.1f} min for a million tokens, at "
            f"{estimates['tflops']:g} TFLOP/s",
        ]
    )
