"""Why VB-LoRA learns slower than LoRA by plain settings, and not by the recipe: what the first steps do.

    python benchmarks/learning.py [--steps 40] [--record results/recipe/learning.json]

The quick start's encoder and sentences; LoRA, the plain settings and the recipe of NLU/recipe_study.py. Of the step
that is named, before it is made:

    update      mean over the layers of |B A| / |W|
    grad A, B   norms of the gradients with respect to the factors
    pull        for each vector of the bank, |sum of its sub-vectors' gradients|^2 over the sum of their squares: 1 if
                they are orthogonal, less if they pull against each other, n if all n pull one way. 1 for LoRA, which
                shares nothing
    along       how far a step goes along a sub-vector's own gradient: the cosine between the signs of its gradient and
                those of what its vectors move by. 1 for LoRA, where every number has a sign of its own
    least       the same, of the kind of layer (query, key, ...) and the factor for which it is least
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import DataCollatorWithPadding, set_seed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "NLU"))

import generate_cola  # noqa: E402
import quickstart  # noqa: E402
import recipe_study  # noqa: E402
import run_glue  # noqa: E402
from glue_data import load_task, tokenize  # noqa: E402
from glue_tasks import get_task  # noqa: E402
from vblora.bank import Layout  # noqa: E402
from vblora.groups import param_groups  # noqa: E402
from vblora.io import write_json  # noqa: E402
from vblora.methods import VBLoRA  # noqa: E402
from vblora.optim import AdamW  # noqa: E402
from vblora.switch import Adapted  # noqa: E402
from vblora_experiments import bars, commands  # noqa: E402
from vblora_experiments.records import environment  # noqa: E402

ROWS = ("lora", "plain", "recipe", "recipe_by_kind")
SHOWN = (1, 5, 10, 20, 40, 80, 160)
WARM_STEPS = 12  # 6% of the quick start's first three epochs


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, not {options.steps}")
    with tempfile.TemporaryDirectory() as folder:
        generate_cola.write(folder, 2000, 8, 0, quickstart.PHENOMENA)
        measured = {name: measure(name, Path(folder), options.steps) for name in ROWS}
    printed = render(measured)
    print("\n".join(printed))
    if options.record:
        record = {"benchmark": "learning", "methods": measured, "printed": printed, **environment()}
        write_json(options.record, record)


def measure(name: str, data: Path, steps: int) -> list[dict[str, float]]:
    """Train by one method, and look at the steps that are shown."""
    values = recipe_study.flags(recipe_study.SENTENCES, name, 3, 0, data, data / name)
    glue, method, training = run_glue.parts(run_glue.of(values))
    set_seed(0)
    adapted, tokenizer = run_glue.build(glue, method, get_task("cola"))
    rows = tokenize(load_task("cola", data)["train"], tokenizer, glue.max_length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    collate, model = DataCollatorWithPadding(tokenizer), adapted.model.train()
    rates = adapted.recipe.rates if adapted.recipe is not None else method.rates()
    optimizer = AdamW(param_groups(model, training.learning_rate, weight_decay=training.weight_decay, **rates))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / WARM_STEPS))
    kept = keep_sub_vectors(adapted.adapter) if isinstance(adapted.adapter, VBLoRA) else {}
    found = []
    for step in bars.bar(range(1, steps + 1), name):
        at = 32 * (step - 1) % (len(rows) - 32)
        loss = model(**collate([rows[number] for number in order[at : at + 32]])).loss
        loss.backward()
        if step in SHOWN:
            found.append({"step": step, "loss": loss.item(), **look(adapted, kept)})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return found


def keep_sub_vectors(adapter: VBLoRA) -> dict[str, Tensor]:
    """Where the table of sub-vectors (N, b) of the last pass will be, with its gradient."""
    kept: dict[str, Tensor] = {}
    compose = adapter.compose

    def composing() -> tuple[Tensor, ...]:
        composed = compose()
        if composed[0].requires_grad:
            composed[0].retain_grad()
            kept["table"] = composed[0]
        return composed

    adapter.compose = composing  # type: ignore[method-assign]
    return kept


@torch.no_grad()
def look(adapted: Adapted, kept: dict[str, Tensor]) -> dict[str, float]:
    if isinstance(adapted.adapter, VBLoRA):
        return look_at_bank(adapted.adapter, adapted.model, kept["table"])
    modules = [m for m in adapted.model.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    a, b = ([getattr(m, name)["default"].weight for m in modules] for name in ("lora_A", "lora_B"))
    weights = [m.base_layer.weight for m in modules]
    return {
        "update": mean([float((y @ x).norm() / w.norm()) for x, y, w in zip(a, b, weights, strict=True)]),
        "grad A": norm([p.grad for p in a]),
        "grad B": norm([p.grad for p in b]),
        "pull": 1.0,
        "along": 1.0,
        "least": 1.0,
    }


def look_at_bank(adapter: VBLoRA, model: torch.nn.Module, table: Tensor) -> dict[str, float]:
    gradient, of_a = table.grad, adapter.layout.parts % 2 == 0
    assert gradient is not None
    modules = dict(model.named_modules())
    factors = zip(adapter.layout.factors(table), adapter.targets, strict=True)
    indices, weights = adapter.selection()  # (N, k)
    parts = weights.unsqueeze(-1) * gradient.unsqueeze(1)  # (N, k, b)
    total = torch.zeros_like(adapter.vector_bank).index_add_(0, indices.flatten(), parts.flatten(0, 1))  # (h, b)
    squares = total.new_zeros(len(total)).index_add_(0, indices.flatten(), parts.square().sum(-1).flatten())
    moved = (weights.unsqueeze(-1) * total.sign()[indices]).sum(1)  # (N, b): of sub-vectors, as the bank's signs move
    learns = gradient.abs().sum(-1) > 0
    along = cosine_similarity(moved, gradient.sign(), dim=-1)  # (N)
    of_kind = [along[kind & learns] for kind in kinds_of(adapter.layout)]
    return {
        "update": mean([float((b.T @ a).norm() / modules[name].weight.norm()) for (a, b), name in factors]),
        "grad A": float(gradient[of_a].norm()),
        "grad B": float(gradient[~of_a].norm()),
        "pull": float((total.square().sum(-1) / squares)[squares > 0].mean()),
        "along": float(along[learns].mean()),
        "least": min(float(values.mean()) for values in of_kind if len(values)),
    }


def kinds_of(layout: Layout) -> list[Tensor]:
    """The rows of the table (N) that each factor of each kind of layer has."""
    return [layout.parts == number for number in layout.parts.unique()]


def norm(gradients: list[Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def render(measured: dict[str, list[dict[str, float]]]) -> list[str]:
    columns = ("loss", "update", "grad A", "grad B", "pull", "along", "least")
    lines = ["| method | step | " + " | ".join(columns) + " |", "|---|" + "---:|" * (1 + len(columns))]
    for name, found in measured.items():
        lines += [f"| {name} | {one['step']} | " + " | ".join(f"{one[c]:.3g}" for c in columns) + " |" for one in found]
    return lines


if __name__ == "__main__":
    commands.run(main, "learning")
