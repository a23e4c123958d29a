"""Time and state of one training step: VB-LoRA here, PEFT's LoRA of the same rank, PEFT's VB-LoRA, and the floor.

    python benchmarks/step_time.py [--shapes roberta_base llama_12] [--rounds 15] [--record results/step_time.json]

Forward, backward and optimiser step on random tokens; the four take turns, one step each in every round, so that what
else the machine does hits all of them. A figure is the median of the rounds' ratios to PEFT's LoRA. The floor is the
frozen base with one bias trained at the bottom, so that the gradient goes all the way down. State is what training
keeps beside the base model: parameters, their gradients, the optimiser's tensors, and VB-LoRA's logits.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

import vblora
from vblora.storage.files import write_json
from vblora.training import commands
from vblora.training.records import environment

LORA, HERE, PEFT, FLOOR = "LoRA in PEFT", "VB-LoRA here", "VB-LoRA in PEFT", "floor"
ENCODER = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """A model, the layers that are adapted, VB-LoRA's settings (Tables 7 and 9) and the batch.

    Attributes:
        accumulation: batches before an optimiser step.
        checkpointing: recompute activations in the backward pass.
    """

    build: Callable[[], nn.Module]
    targets: list[str]
    bank: dict[str, int]
    batch: int
    length: int
    accumulation: int = 1
    checkpointing: bool = False


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=1000))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12))


GLUE_BANK = {"num_vectors": 90, "vector_length": 256}
LLAMA_BANK = {"num_vectors": 2048, "vector_length": 256}
SHAPES = {
    "roberta_base": Shape(roberta, ENCODER, GLUE_BANK, 32, 64),
    "llama_12": Shape(llama, DECODER, LLAMA_BANK, 4, 128),
    "llama_12_accumulated": Shape(llama, DECODER, LLAMA_BANK, 4, 128, accumulation=4),
    "llama_12_checkpointed": Shape(llama, DECODER, LLAMA_BANK, 4, 128, checkpointing=True),
}
SMALL = Shape(  # for a look at whether it runs
    lambda: RobertaForSequenceClassification(
        RobertaConfig(vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    ),
    ENCODER,
    {"num_vectors": 16, "vector_length": 32},
    2,
    8,
)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "small"], default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, not {options.rounds}")
    results = {name: measure(SHAPES.get(name, SMALL), options.rounds) for name in options.shapes}
    print(render(results))
    if options.record:
        write_json(options.record, {"benchmark": "step_time", "rounds": options.rounds, **results, **environment()})


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = shape.build().to(device)
    if shape.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    ways = {name: way(copy.deepcopy(base), shape) for name, way in WAYS.items()}
    ids = torch.randint(3, 1000 if shape is not SMALL else 50, (shape.batch, shape.length), device=device)
    labels = ids if isinstance(base, LlamaForCausalLM) else ids[:, 0] % 2
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, (model, optimizer) in ways.items():
            taken = step(model, optimizer, ids, labels, shape.accumulation)
            if turn > 1:  # the first are to warm up
                seconds[name].append(taken)
    return {
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "times_lora": {
            name: statistics.median(a / b for a, b in zip(taken, seconds[LORA], strict=True))
            for name, taken in seconds.items()
        },
        "state_bytes": {name: state_bytes(*way) for name, way in ways.items()},
    }


# ------------------------------------------------------------------------------------------ the four ways


def _here(model: nn.Module, shape: Shape) -> tuple[nn.Module, torch.optim.Optimizer]:
    vblora.attach(model, vblora.VBLoRAConfig(r=4, topk=2, target_modules=shape.targets, **shape.bank), seed=0)
    groups = vblora.param_groups(model, lr=1e-3, lr_vector_bank=1e-3, lr_logits=1e-2)
    return model.train(), vblora.AdamW(groups)


def _peft(model: nn.Module, shape: Shape) -> tuple[nn.Module, torch.optim.Optimizer]:
    settings = peft.VBLoRAConfig(r=4, topk=2, target_modules=shape.targets, vblora_dropout=0.0, **shape.bank)
    return _with_peft(model, settings)


def _lora(model: nn.Module, shape: Shape) -> tuple[nn.Module, torch.optim.Optimizer]:
    return _with_peft(model, peft.LoraConfig(r=4, lora_alpha=4, target_modules=shape.targets))


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
    lines = ["| model | | ms a step | times LoRA's | state, MB |", "|---|---|---:|---:|---:|"]
    for shape, found in results.items():
        lines += [
            f"| {shape} | {way} | {1000 * found['seconds'][way]:.0f} | {found['times_lora'][way]:.3f} "
            f"| {found['state_bytes'][way] / 1e6:.1f} |"
            for way in WAYS
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    commands.run(main, "step_time")
