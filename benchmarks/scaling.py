"""On paper: what training, exchanging and keeping adapters takes at sizes that no machine here has.

    python benchmarks/scaling.py [--active results/speed/active_logits.json] [--record results/speed/scaling.json]

Nothing is timed. N, gradients and adapters follow from the layers' shapes; the slots of a sub-vector's logits come from
the training measured in --active; packed bytes are those of files written here, of random adapters of these shapes.
VB-LoRA: r 4, h 2048, b 256, k 2; LoRA: r 64; all linear layers. PEFT's VB-LoRA keeps and exchanges all h logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from turns import report

from vblora.bank import at_most_one
from vblora.counts import count_lora
from vblora.files import packed
from vblora.io import read_json
from vblora.methods import VBLoRAConfig
from vblora.shapes import LayerShape, sub_vectors
from vblora_experiments import commands

R, H, B, K, LORA_R = 4, 2048, 256, 2, 64
STATE = 16  # bytes of a trained number in float32: itself, its gradient, two moments
GPUS = 1024
RATE = 50e9  # bytes per second that a GPU sends and receives between machines: 400 Gb/s
ACTIVE = Path(__file__).resolve().parents[1] / "results" / "speed" / "active_logits.json"
SIZES = {"Llama2-7B": (32, 4096, 4096, 11008), "Llama2-70B": (80, 8192, 1024, 28672)}  # layers, width, keys, between


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--active", type=Path, default=ACTIVE, help="a record of active_logits.py")
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    width = slots(options.active)
    results = {name: of_model(llama(*size), width) for name, size in SIZES.items()}
    report("scaling", {"slots": width, "models": results}, render(results, width), options.record)


def slots(record: Path) -> int:
    """The widest table of the trainings in a record.

    Raises:
        ValueError: it is no record of active_logits.py, or of another bank.
    """
    found = read_json(record)
    if found.get("benchmark") != "active_logits" or found.get("num_vectors") != H:
        raise ValueError(f"--active {record} is no record of active_logits.py with --num_vectors {H}")
    return max(at["width"] for run in found["runs"].values() for at in run)


def llama(layers: int, width: int, keys: int, between: int) -> list[LayerShape]:
    outputs = {
        "q_proj": width,
        "k_proj": keys,
        "v_proj": keys,
        "o_proj": width,
        "gate_proj": between,
        "up_proj": between,
    }
    block = [LayerShape(name, width, out) for name, out in outputs.items()]
    block.append(LayerShape("down_proj", between, width))
    return [shape._replace(name=f"layers.{i}.{shape.name}") for i in range(layers) for shape in block]


def of_model(shapes: list[LayerShape], width: int) -> dict[str, Any]:
    n, lora = sub_vectors(shapes, R, B), count_lora(shapes, r=LORA_R).parameters
    bank = H * B
    state = {"LoRA": STATE * lora, "PEFT": STATE * (n * H + bank), "here": n * (16 * width + 24 * K) + STATE * bank}
    gradients = {"LoRA": 4 * lora, "PEFT": 4 * (n * H + bank), "here": 4 * (n * K + bank)}
    adapter = random_adapter(shapes)
    files = {
        "lossless": len(packed.dumps(adapter)),
        "int8 bank, 8-bit weights": len(packed.dumps(adapter, bank="int8", weights=8)),
        "shared bank, 8-bit weights": len(packed.dumps(adapter, bank="shared", weights=8)),
    }
    return {
        "sub_vectors": n,
        "state_bytes": state,
        "gradient_bytes": gradients,
        # A ring all-reduce sends every number to the next GPU twice but for its own share.
        "seconds_exchanging": {way: 2 * (GPUS - 1) / GPUS * size / RATE for way, size in gradients.items()},
        "adapter_bytes": {"LoRA, float32": 4 * lora, "LoRA, bfloat16": 2 * lora, **files},
    }


def random_adapter(shapes: list[LayerShape]) -> packed.Content:
    config = VBLoRAConfig(r=R, num_vectors=H, vector_length=B, topk=K, target_modules="all-linear")
    generator = torch.Generator().manual_seed(0)
    n = sub_vectors(shapes, R, B)
    first, apart = (torch.randint(low, H, (n,), generator=generator) for low in (0, 1))
    indices = torch.stack([first, (first + apart) % H], dim=1)  # K = 2 different ones
    weights = at_most_one(torch.randn(n, K, generator=generator).sort(descending=True).values.softmax(-1)[:, :-1])
    bank = 0.02 * torch.randn(H, B, generator=generator)
    tensors = {"vector_bank": bank, "topk_indices": indices, "topk_weights": weights}
    return packed.Content(config, shapes, tensors)


WAYS = {"LoRA": "LoRA r 64", "PEFT": "VB-LoRA in PEFT", "here": "VB-LoRA here"}
QUANTITIES = {  # title, what of a model, its unit, and how it is printed
    "training state, MB": ("state_bytes", 1e-6, ",.0f"),
    "gradients of a step, MB": ("gradient_bytes", 1e-6, ",.1f"),
    f"exchanged between {GPUS:,} GPUs in ms": ("seconds_exchanging", 1e3, ",.2f"),
    "an adapter's file, MB": ("adapter_bytes", 1e-6, ",.2f"),
}


def render(results: dict[str, Any], width: int) -> str:
    lines = [f"| | | {' | '.join(results)} |", f"|---|---|{'---:|' * len(results)}"]
    lines.append(f"| sub-vectors, N | | {' | '.join(format(one['sub_vectors'], ',') for one in results.values())} |")
    for title, (what, unit, form) in QUANTITIES.items():
        for way in next(iter(results.values()))[what]:
            name = WAYS.get(way) or (way if way.startswith("LoRA") else f"VB-LoRA packed, {way}")
            values = [format(one[what][way] * unit, form) for one in results.values()]
            lines.append(f"| {title} | {name} | {' | '.join(values)} |")
    lines += [
        "",
        f"{width} slots for each sub-vector's logits; {RATE / 1e9:.0f} GB/s for each GPU; LoRA's files at r 64.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    commands.run(main, "scaling")
