"""What a run would store, hold in memory and take, from the model's configuration alone: no weights are loaded.

The memory is that of one device which holds the whole model. It is an estimate: what the allocator, the kernels and
the dequantised copy of one layer need comes on top.
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
    stored, states = adapter_sizes(model, instruct, method)
    limits = instruct.limits()
    length = limits.total if DATA_FORMATS[instruct.data_format].together else limits.source + limits.target
    length = instruct.pack_length or length
    tokens = length * training.per_device_train_batch_size
    # The vocabulary's output and its gradient are kept in float32 beside the model's own precision.
    outputs = tokens * model.config.vocab_size * (2 + 4 + 4)
    kept = activation_bytes(model, tokens, training.gradient_checkpointing)
    flops = operations(total, full, training.gradient_checkpointing)
    return {
        "model": instruct.model_name_or_path,
        "model_parameters": total,
        "stored_parameters": None if stored is None else stored.parameters,
        "stored_bytes": None if stored is None else stored.bytes,
        "base_bytes": base,
        "training_state_bytes": states,
        "activation_bytes": kept,
        "output_bytes": outputs,
        "memory_bytes": base + states + kept + outputs,
        "longest_batch_tokens": tokens,
        "operations_per_token": flops,
        "tflops": instruct.tflops,
        "tokens_per_second": instruct.tflops * 1e12 / flops,
    }


def skeleton(name: str) -> Any:
    """The model of this name, without memory for its weights.

    Raises:
        ValueError: its configuration cannot be had.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = from_hub(lambda: AutoConfig.from_pretrained(name), name, models.FLAG)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def weight_bytes(model: Any, bits: int, dtype: str) -> int:
    """Of the base model: its linear layers but the output layer in `bits`, the rest in `dtype`."""
    kept = getattr(model.config, "dtype", None) if dtype == "auto" else models.torch_dtype(dtype)
    size = (kept if isinstance(kept, torch.dtype) else torch.float32).itemsize
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if is_linear(m) and m is not head)
    rest = sum(p.numel() for p in model.parameters()) - linear
    per_weight = {16: size, 8: 1, 4: FOUR_BIT}[bits]
    return round(linear * per_weight + rest * size)


def adapter_sizes(model: Any, instruct: Any, method: Any) -> tuple[Count | None, int]:
    """What is stored, and the bytes of all that is trained, with gradients and AdamW's moments.

    None and 0 for a method that has no counting rule here.
    """
    if method.method == "full":
        parameters = sum(p.numel() for p in model.parameters())
        return count_full(parameters), STATE * parameters
    settings = method.settings(target_modules(instruct.targets), None)
    if method.method in OWN_METHODS:
        config: Any = own_config(model, method.method, settings)[0]
        where = config
    else:
        config = peft_config(method.method, settings)
        where = VBLoRAConfig(target_modules=settings["target_modules"])
    shapes = layer_shapes(find_targets(model, where), where)
    if method.method not in METHODS:
        return None, 0
    fields = FIELDS if method.method == "vblora" else FIELDS[:1]
    stored = METHODS[method.method](shapes, **{name: getattr(config, name) for name in fields})
    if method.method != "vblora":
        return stored, STATE * stored.parameters
    # Logits, two moments and an index of the entries in the table (vblora/logits.py); of the selected ones also a
    # value and a gradient of their own, and two indices of eight bytes.
    count = sub_vectors(shapes, config.r, config.vector_length)
    table, selected = count * min(SLOTS, config.num_vectors), count * config.topk
    return stored, STATE * config.num_vectors * config.vector_length + 16 * table + 24 * selected


def target_modules(targets: str) -> Any:
    """What `targets` names: "all" is every linear layer but the output layer; else a regular expression."""
    return {"all": "all-linear", "qv": QV}.get(targets, targets)


def activation_bytes(model: Any, tokens: int, checkpointing: bool) -> int:
    """Of one batch, in two bytes a number: with checkpointing the input of each block, and one block whole.

    A block without checkpointing keeps some 34 numbers per token and unit of width (Korthikanti et al. 2022, equation
    2, in bytes; without attention's square, which fused attention does not keep).
    """
    config = model.config
    block = 34 * tokens * config.hidden_size
    if not checkpointing:
        return config.num_hidden_layers * block
    return config.num_hidden_layers * 2 * tokens * config.hidden_size + block


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
    return "\n".join(
        [
            f"{estimates['model']}: {estimates['model_parameters']:,} parameters",
            f"stored parameters     {count}",
            f"memory, about         {gib('memory_bytes')} at the longest batch ({estimates['longest_batch_tokens']:,} "
            "tokens):",
            f"  base model          {gib('base_bytes')}",
            f"  trained, with AdamW {gib('training_state_bytes')}",
            f"  activations         {gib('activation_bytes')}",
            f"  vocabulary outputs  {gib('output_bytes')}",
            f"time, about           {1e6 / estimates['tokens_per_second'] / 60:.1f} min for a million tokens, at "
            f"{estimates['tflops']:g} TFLOP/s",
        ]
    )
