"""Bytes of the adapter files for RoBERTa-base, all linear layers: this project's VB-LoRA beside PEFT's adapters.

    python benchmarks/file_sizes.py [--record results/file_sizes.json]

File sizes do not depend on the weights, so the model is built from its configuration with random ones.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import peft
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import vblora
from vblora.io import write_json
from vblora_experiments.records import environment

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
BANK: dict[str, Any] = {"r": 4, "num_vectors": 90, "vector_length": 256, "topk": 2}  # Table 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    record = parser.parse_args().record
    base = RobertaForSequenceClassification(RobertaConfig(vocab_size=100))  # the vocabulary is not adapted
    sizes = {
        "VB-LoRA here, top-k form": ours(base, "topk"),
        'VB-LoRA here, top-k form, format="native"': ours(base, "topk", "native"),
        "VB-LoRA here, full form (to go on training)": ours(base, "full"),
        "VB-LoRA in PEFT, top-k form": theirs(base, peft.VBLoRAConfig(**BANK, save_only_topk_weights=True, **where())),
        "VB-LoRA in PEFT, default (all logits)": theirs(base, peft.VBLoRAConfig(**BANK, **where())),
        "LoRA r 8 in PEFT": theirs(base, peft.LoraConfig(r=8, **where())),
    }
    lora = sizes["LoRA r 8 in PEFT"]
    print("| adapter of RoBERTa-base, all linear layers | file bytes | of LoRA's |\n|---|---:|---:|")
    for name, size in sizes.items():
        print(f"| {name} | {size:,} | {size / lora:.1%} |")
    if record:
        write_json(record, {"benchmark": "file_sizes", "bytes": sizes, **environment()})


def where() -> dict[str, Any]:
    return {"target_modules": list(TARGETS)}


def ours(base: nn.Module, form: str, format: str = "auto") -> int:
    model = copy.deepcopy(base)
    adapter = vblora.attach(model, vblora.VBLoRAConfig(**BANK, **where()), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        vblora.save(adapter, folder, form=form, format=format)
        return tensor_bytes(folder)


def theirs(base: nn.Module, config: peft.PeftConfig) -> int:
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return tensor_bytes(folder)


def tensor_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


if __name__ == "__main__":
    main()
