"""Which rate suits models narrower than the one that the recipe's was searched on: 384 wide.

    python benchmarks/narrow.py [--widths 32 64 128 256] [--seeds 0 1 2 3] [--record results/recipe/narrow.json]

A BERT of three blocks is built, and trained whole on one task of token sequences (is their mean above the middle?)
until it knows something. Then VB-LoRA by the recipe adapts all its linear layers to another (are there more of these
two tokens than of those two?), 150 steps of 32. LoRA's rate is 2e-3 at 384 wide, and on a narrower model the same, or
larger in inverse proportion to the width, or to its root. Printed: the mean loss of the last ten steps, one for each
seed, which is about 0.64 for a model that knows only how frequent the two answers are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import BertConfig, BertForSequenceClassification

import vblora
from vblora.io import write_json
from vblora_experiments import bars, commands
from vblora_experiments.records import environment

SEARCHED_RATE, SEARCHED_WIDTH = 2e-3, 384
LAWS: dict[str, Callable[[int], float]] = {
    "the same": lambda width: SEARCHED_RATE,
    "1/root": lambda width: SEARCHED_RATE * (SEARCHED_WIDTH / width) ** 0.5,
    "1/width": lambda width: SEARCHED_RATE * SEARCHED_WIDTH / width,
}
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
ROWS, LENGTH, BATCH = 400, 12, 32
LEARN_FIRST, STEPS, LAST = 200, 150, 10


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256], help="multiples of 4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    if wrong := [width for width in options.widths if width < 4 or width % 4]:
        raise ValueError(f"--widths must be multiples of 4 (BERT has four heads), not {wrong[0]}")
    trials = [(width, law) for width in options.widths for law in LAWS]
    measured = [
        {"width": width, "law": law, "rate": LAWS[law](width), "losses": losses(width, LAWS[law](width), options.seeds)}
        for width, law in bars.bar(trials, "trials")
    ]
    printed = render(measured)
    print("\n".join(printed))
    if options.record:
        record = {"benchmark": "narrow", "seeds": options.seeds, "measured": measured, "printed": printed}
        write_json(options.record, {**record, **environment()})


def render(measured: list[dict[str, Any]]) -> list[str]:
    lines = ["| width | LoRA's rate | in proportion | loss of each seed |", "| ---: | ---: | --- | ---: |"]
    for one in measured:
        each = " ".join(f"{loss:.2f}" for loss in one["losses"])
        lines.append(f"| {one['width']} | {one['rate']:.2g} | {one['law']} | {each} |")
    return lines


def losses(width: int, lora_rate: float, seeds: list[int]) -> list[float]:
    return [round(loss(width, lora_rate, seed), 4) for seed in seeds]


def loss(width: int, lora_rate: float, seed: int) -> float:
    """The mean loss of the last steps of one run."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 20, (ROWS, LENGTH), generator=generator)
    torch.manual_seed(seed)
    model = BertForSequenceClassification(small_bert(width))
    known = (tokens.float().mean(1) > 10).long()  # (ROWS)
    train(model, tokens, known, torch.optim.AdamW(model.parameters(), 1e-3), None, LEARN_FIRST, generator)
    chosen = vblora.recipe(model, TARGETS, lora_rate=lora_rate, modules_to_save=["classifier"])
    vblora.attach(model, chosen.config)
    optimizer = vblora.AdamW(chosen.param_groups(model, lr=1e-3))
    schedule = chosen.schedule(optimizer, STEPS)
    more = ((tokens == 5) | (tokens == 7)).sum(1) > ((tokens == 6) | (tokens == 8)).sum(1)  # (ROWS)
    found = train(model, tokens, more.long(), optimizer, schedule, STEPS, generator)
    return sum(found[-LAST:]) / LAST


def small_bert(width: int) -> BertConfig:
    return BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=100,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )


def train(
    model: nn.Module,
    tokens: Tensor,
    labels: Tensor,
    optimizer: Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None,
    steps: int,
    generator: torch.Generator,
) -> list[float]:
    """The loss of each step."""
    found = []
    for _ in range(steps):
        rows = torch.randint(0, ROWS, (BATCH,), generator=generator)
        step_loss = model(tokens[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        found.append(step_loss.item())
    return found


if __name__ == "__main__":
    commands.run(main, "narrow")
