"""Time and state of one training step: VB-LoRA here, PEFT's LoRA of the same rank, PEFT's VB-LoRA, and the floor.

    python benchmarks/step_time.py [--shapes roberta_base llama_12] [--rounds 15] [--record results/step_time.json]

Forward, backward and optimiser step on random tokens; the four take turns, one step each in every round, so that what
else the machine does hits all of them. A figure is the median of the rounds' ratios to PEFT's LoRA. The floor is the
frozen base with one bias trained at the bottom, so that the gradient goes all the way down. State is what training
keeps beside the base model: parameters, their gradients, the optimiser's tensors, and VB-LoRA's logits. The peak is
what a step holds at most beyond what there is between steps: activations, gradients, dequantised layers.

Last result (results/speed/step_time.json, CPU): VB-LoRA here 0.90 to 0.95 of LoRA's time on the four shapes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification
from turns import medians, parser, ratios, report, require_positive, take_turns

import vblora
from vblora_experiments import commands
from vblora_experiments.memory import peak_bytes

LORA, HERE, PEFT, FLOOR = "LoRA in PEFT", "VB-LoRA here", "VB-LoRA in PEFT", "floor"
ENCODER = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """A model, the layers that are adapted, VB-LoRA's settings (Tables 7 and 9) and the batch.

    Attributes:
        accumulation: batches before an optimiser step.
        checkpointing: recompute activations in the backward pass.
        dtype: of the base model.
        four_bits: its linear layers are in NF4 with double quantisation; PEFT's VB-LoRA has no such layers.
    """

    build: Callable[[], nn.Module]
    targets: list[str]
    bank: dict[str, int]
    batch: int
    length: int
    accumulation: int = 1
    checkpointing: bool = False
    dtype: torch.dtype = torch.float32
    four_bits: bool = False

    @property
    def settings(self) -> dict[str, int]:
        return {"r": 4, "topk": 2, **self.bank}


def roberta(**sizes: int) -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**{"vocab_size": 1000, **sizes}))


def llama(**sizes: int) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes))


GLUE_BANK = {"num_vectors": 90, "vector_length": 256}
LLAMA_BANK = {"num_vectors": 2048, "vector_length": 256}
TWELVE = partial(llama, hidden_size=768, intermediate_size=2048, num_hidden_layers=12)
SEVEN_B = partial(llama, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
SHAPES = {
    "roberta_base": Shape(roberta, ENCODER, GLUE_BANK, 32, 64),
    "llama_12": Shape(TWELVE, DECODER, LLAMA_BANK, 4, 128),
    "llama_12_accumulated": Shape(TWELVE, DECODER, LLAMA_BANK, 4, 128, accumulation=4),
    "llama_12_checkpointed": Shape(TWELVE, DECODER, LLAMA_BANK, 4, 128, checkpointing=True),
}
GPU_SHAPES = {
    "llama2_7b": Shape(SEVEN_B, DECODER, LLAMA_BANK, 4, 512, checkpointing=True, dtype=torch.bfloat16),
    "llama2_7b_nf4": Shape(
        SEVEN_B, DECODER, LLAMA_BANK, 4, 512, checkpointing=True, dtype=torch.bfloat16, four_bits=True
    ),
}
SMALL_BANK = {"num_vectors": 16, "vector_length": 32}
SMALL_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {  # for a look at whether it runs
    "small": Shape(partial(roberta, **SMALL_SIZES), ENCODER, SMALL_BANK, 2, 8),
    "small_nf4": Shape(partial(llama, **SMALL_SIZES), DECODER, SMALL_BANK, 2, 8, four_bits=True),
}


def main(arguments: list[str]) -> None:
    known = {**SHAPES, **GPU_SHAPES, **SMALL}
    options_of = parser(__doc__, rounds=15)
    options_of.add_argument("--shapes", nargs="+", choices=list(known), help="those for this machine unless given")
    options = options_of.parse_args(arguments)
    require_positive(options, "rounds")
    names = options.shapes or list(GPU_SHAPES if torch.cuda.is_available() else SHAPES)
    results = {name: measure(known[name], options.rounds) for name in names}
    report("step_time", {"rounds": options.rounds, **results}, render(results), options.record)


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = build(shape, device)
    ways = {name: way(twin(base), shape) for name, way in WAYS.items() if name != PEFT or not shape.four_bits}
    ids = torch.randint(3, 1000, (shape.batch, shape.length), device=device)
    labels = ids if isinstance(base, LlamaForCausalLM) else ids[:, 0] % 2
    steps = {name: partial(step, *way, ids, labels, shape.accumulation) for name, way in ways.items()}
    seconds = take_turns(steps, rounds, warm_up=2)
    return {
        "seconds": medians(seconds),
        "times_lora": ratios(seconds, LORA),
        "state_bytes": {name: state_bytes(*way) for name, way in ways.items()},
        "peak_bytes": {name: peak_bytes(one) for name, one in steps.items()},
    }


def build(shape: Shape, device: str) -> nn.Module:
    with torch.device(device):
        base = shape.build().to(shape.dtype)
    if shape.four_bits:
        in_four_bits(base, device, shape.dtype)
    if shape.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return base


def in_four_bits(model: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Quantise the linear layers of a Llama's blocks as QLoRA does."""
    import bitsandbytes

    for block in model.model.layers:  # type: ignore[union-attr]
        for module in list(block.modules()):
            for name, layer in list(module.named_children()):
                if type(layer) is nn.Linear:
                    new = bitsandbytes.nn.Linear4bit(
                        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                    )
                    new.load_state_dict({"weight": layer.weight.detach()})
                    setattr(module, name, new.to(device))


def twin(base: nn.Module) -> nn.Module:
    """A copy of the model that shares its frozen matrices: four whole ones of 7B would not fit a GPU."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters() if p.ndim > 1})


# ------------------------------------------------------------------------------------------ the four ways


def _here(model: nn.Module, shape: Shape) -> tuple[nn.Module, torch.optim.Optimizer]:
    vblora.attach(model, vblora.VBLoRAConfig(target_modules=shape.targets, **shape.settings), seed=0)
    groups = vblora.param_groups(model, lr=1e-3, lr_vector_bank=1e-3, lr_logits=1e-2)
    return model.train(), vblora.AdamW(groups)


def _peft(model: nn.Module, shape: Shape) -> tuple[nn.Module, torch.optim.Optimizer]:
    settings = peft.VBLoRAConfig(target_modules=shape.targets, vblora_dropout=0.0, **shape.settings)
    return _with_peft(model, settings)


def _lora(model: nn.Module, shape: Shape) -> tuple[nn.Module, torch.optim.Optimizer]:
    return _with_peft(
        model, peft.LoraConfig(r=shape.settings["r"], lora_alpha=shape.settings["r"], target_modules=shape.targets)
    )


def _with_peft(model: nn.Module, settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    wrapped = peft.get_peft_model(model, settings).train()
    return wrapped, torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)


def _floor(model: nn.Module, shape: Shape) -> tuple[nn.Module, torch.optim.Optimizer]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    bottom = next(p for name, p in model.named_parameters() if p.ndim == 1)  # the first norm's
    bottom.requires_grad_(True)
    return model.train(), torch.optim.AdamW([bottom], lr=1e-3)


WAYS = {FLOOR: _floor, LORA: _lora, HERE: _here, PEFT: _peft}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Any, labels: Any, accumulation: int) -> float:
    """Seconds of one optimiser step and the batches before it."""
    began = time.perf_counter()
    for _ in range(accumulation):
        (model(input_ids=ids, labels=labels).loss / accumulation).backward()
    optimizer.step()
    optimizer.zero_grad()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what is trained, of its gradients, of the optimiser's tensors and of VB-LoRA's logits and indices."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    kept += [b for m in model.modules() if isinstance(m, vblora.Adapter) for b in m.buffers()]
    once = {t.data_ptr(): t for t in kept if t.numel()}.values()  # optimiser and adapter share the logits' indices
    return sum(t.numel() * t.element_size() for t in [*trained, *trained, *once])


def render(results: dict[str, Any]) -> str:
    lines = ["| model | | ms a step | times LoRA's | state, MB | peak, MB |", "|---|---|---:|---:|---:|---:|"]
    for shape, found in results.items():
        lines += [
            f"| {shape} | {way} | {1000 * found['seconds'][way]:.0f} | {found['times_lora'][way]:.3f} "
            f"| {found['state_bytes'][way] / 1e6:.1f} | {found['peak_bytes'][way] / 1e6:.1f} |"
            for way in found["seconds"]
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    commands.run(main, "step_time")
