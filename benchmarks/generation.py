"""Time of a generated token: VB-LoRA unmerged and merged, and PEFT's VB-LoRA and LoRA unmerged.

    python benchmarks/generation.py [--layers 12] [--width 768] [--batches 1 8] [--rounds 5] [--record FILE]

Greedy generation by transformers with its cache of keys and values, 16 tokens given and 32 generated for each row, by
the same adapter in every way (PEFT's LoRA is its exact export). The ways take turns; a figure is the median of the
rounds' ratios to the merged model, which runs as the base model does. Random weights.

Last result (results/speed/generation.json, CPU): unmerged 1.05 of merged at one row, 1.04 at eight.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import adapters
import torch
from torch import Tensor
from turns import medians, parser, ratios, report, require_positive, take_turns, timed

import vblora
from vblora_experiments import commands

PROMPT, NEW = 16, 32  # tokens of a row: given, and generated
UNMERGED, MERGED, PEFT, LORA = "unmerged", "merged", "VB-LoRA in PEFT", "LoRA in PEFT"
GOAL = 1.05


def main(arguments: list[str]) -> None:
    options_of = parser(__doc__, rounds=5)
    options_of.add_argument("--layers", type=int, default=12)
    options_of.add_argument("--width", type=int, default=768)
    options_of.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows generated at once")
    options = options_of.parse_args(arguments)
    require_positive(options, "rounds", "layers", "width", "batches")
    models = build(options.width, options.layers)
    results = {str(batch): measure(models, batch, options.rounds) for batch in options.batches}
    shape = {"layers": options.layers, "width": options.width, "prompt": PROMPT, "new": NEW}
    found = {**shape, "rounds": options.rounds, "batches": results}
    report("generation", found, render(results), options.record)


def build(width: int, layers: int) -> dict[str, Any]:
    """The model in every way, with one adapter."""
    base = adapters.llama(width, layers).to("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        adapters.write(base, Path(folder))
        models = {name: copy.deepcopy(base) for name in (UNMERGED, MERGED)}
        for model in models.values():
            vblora.load(model, str(Path(folder) / adapters.TOPK))
        models[MERGED].vblora_adapter.merge(reversible=False)
        models[PEFT] = adapters.with_peft(base, Path(folder) / adapters.TOPK)
        models[LORA] = adapters.with_peft(base, Path(folder) / adapters.LORA)
    return models


def measure(models: dict[str, Any], batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of a token by each way, times the merged model's, and whether the texts are the merged model's."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 1000, (batch, PROMPT), generator=generator).to(next(models[MERGED].parameters()).device)
    texts = {name: generate(model, ids) for name, model in models.items()}  # to warm up, too
    ways: dict[str, Callable[[], float]] = {
        name: partial(timed, partial(generate, model, ids)) for name, model in models.items()
    }
    seconds = take_turns(ways, rounds, warm_up=0)
    return {
        "seconds_per_token": {name: taken / NEW for name, taken in medians(seconds).items()},
        "times_merged": ratios(seconds, MERGED),
        "same_text": {name: torch.equal(text, texts[MERGED]) for name, text in texts.items()},
    }


@torch.no_grad()
def generate(model: Any, ids: Tensor) -> Tensor:
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)


def render(results: dict[str, Any]) -> str:
    lines = ["| rows | | ms a token | times merged | same text |", "|---:|---|---:|---:|---|"]
    for batch, found in results.items():
        lines += [
            f"| {batch} | {way} | {1000 * taken:.2f} | {found['times_merged'][way]:.3f} "
            f"| {'yes' if found['same_text'][way] else 'no'} |"
            for way, taken in found["seconds_per_token"].items()
        ]
    return "\n".join([*lines, "", f"Goal: unmerged at most {GOAL} times merged."])


if __name__ == "__main__":
    commands.run(main, "generation")
