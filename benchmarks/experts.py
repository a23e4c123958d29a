"""Experts adapted with the bank of all other layers: what is counted at full size, and how far tiny models are off.

    python benchmarks/experts.py [--record results/experts.json]

Full size: the published shapes, without memory for weights; all linear layers, and these with the experts; LoRA and
VB-LoRA at r 4, the latter with the paper's bank for large models (h 2048, b 256, k 2; b 64 where 256 does not divide
the widths). Tiny: models of the same classes with random weights in float32; the largest difference of a logit from
what the same adapter gives in float64, merged. Compared are the adapter, its merged weights, and the exported LoRA in
PEFT.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import vblora
from vblora.counts import count_lora, sub_vectors
from vblora.io import write_json
from vblora.targets import find_targets, layer_shapes
from vblora_experiments import commands
from vblora_experiments.records import environment

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
QWEN = {"hidden_size": 2048, "num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128}
TINY = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
TINY |= {"num_key_value_heads": 2, "intermediate_size": 48, "num_experts_per_tok": 2, "initializer_range": 0.1}
# The configuration's class; the settings of the published model, where they are not the class's own; of the tiny one.
MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "Mixtral-8x7B": (transformers.MixtralConfig, {}, {"num_local_experts": 4}),
    "Qwen3-30B-A3B": (
        transformers.Qwen3MoeConfig,
        {**QWEN, "num_attention_heads": 32, "num_experts": 128, "moe_intermediate_size": 768, "vocab_size": 151_936},
        {"num_experts": 4, "moe_intermediate_size": 48},
    ),
    "gpt-oss-20b": (
        transformers.GptOssConfig,
        {"num_hidden_layers": 24, "num_local_experts": 32},
        {"num_local_experts": 4, "sliding_window": 8},
    ),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    found = {name: {"full": count(name), "tiny": differences(name)} for name in options.models}
    printed = render(found)
    print("\n".join(printed))
    if options.record:
        write_json(options.record, {"benchmark": "experts", "models": found, "printed": printed, **environment()})


def count(name: str) -> dict[str, Any]:
    """What is stored for the published shapes."""
    make, settings, _ = MODELS[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(make(**settings))
    total = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    found: dict[str, Any] = {"parameters": total, "in_experts": inside / total}
    b = 64 if model.config.hidden_size % 256 else 256
    for what, parameters in {"layers": None, "with_experts": EXPERTS}.items():
        where = {"target_modules": "all-linear", "target_parameters": parameters}
        config = vblora.VBLoRAConfig(r=4, num_vectors=2048, vector_length=b, **where)
        shapes = layer_shapes(find_targets(model, config), config)
        of_lora, stored = count_lora(shapes, r=4), config.count(shapes)
        found[what] = {
            "matrices": len(shapes),
            "vector_length": b,
            "sub_vectors": sub_vectors(shapes, 4, b),
            "lora": of_lora.parameters,
            "vblora": stored.parameters,
            "bytes": {"lora": of_lora.bytes, "vblora": stored.bytes},
        }
    return found


def differences(name: str) -> dict[str, Any]:
    """How far the ways of running one adapter are from its outputs in float64."""
    make, _, settings = MODELS[name]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(make(**TINY, **settings)).eval()
    exact = copy.deepcopy(base).double()
    exact.set_experts_implementation("eager")  # the others take no float64
    ids = torch.randint(0, 100, (4, 16))
    config = {"r": 4, "num_vectors": 32, "vector_length": 16, "init_vector_bank_bound": 0.3, "init_logits_std": 1.0}
    where = {"target_modules": "all-linear", "target_parameters": EXPERTS}
    for model in (base, exact):
        adapter = vblora.attach(model, vblora.VBLoRAConfig(**config, **where), seed=0)
    adapter.double().merge()  # the sum with weights in float64
    model, adapter = base, base.vblora_adapter
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = exact(ids).logits
        with adapter.disabled():
            effect = (model(ids).logits - expected).abs().max()
        adapter.export_lora(f"{folder}/lora")
        ways = {"adapter": model(ids).logits}
        adapter.merge()
        ways["merged"] = model(ids).logits
        adapter.unmerge()
        adapter.detach()
        ways["PEFT's LoRA"] = peft.PeftModel.from_pretrained(model, f"{folder}/lora").eval()(ids).logits
    apart = {way: float((logits - expected).abs().max()) for way, logits in ways.items()}
    return {"effect": float(effect), "apart": apart}


def render(models: dict[str, Any]) -> list[str]:
    """The figures for reading, in Markdown."""
    lines = [
        "| model | in experts | adapted | matrices | sub-vectors | LoRA | VB-LoRA | bytes of both |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in models.items():
        full = found["full"]
        for what, first in (("layers", f"{name} | {full['in_experts']:.1%}"), ("with_experts", " | ")):
            of, words = full[what], what.replace("_", " ")
            sizes = f"{of['lora'] / 1e6:.2f}M | {of['vblora'] / 1e6:.2f}M"
            sizes += f" | {of['bytes']['lora']:,}, {of['bytes']['vblora']:,}"
            lines.append(f"| {first} | {words} | {of['matrices']:,} | {of['sub_vectors']:,} | {sizes} |")
    lines += ["", "| tiny model of | adapter's effect | adapter | merged | PEFT's LoRA |", "|---|---:|---:|---:|---:|"]
    for name, found in models.items():
        apart = " | ".join(f"{found['tiny']['apart'][way]:.1e}" for way in ("adapter", "merged", "PEFT's LoRA"))
        lines.append(f"| {name} | {found['tiny']['effect']:.2f} | {apart} |")
    return lines


if __name__ == "__main__":
    commands.run(main, "experts")
