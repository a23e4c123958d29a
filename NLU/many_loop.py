"""The model, the rows and the training loop that all runs of many_tasks.py share."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import vblora
from encoders import MINILM, find_model, load_classifier
from glue_data import load_task, tokenize
from glue_tasks import TASKS, compute_metrics
from vblora.recipes import MAX_GRAD_NORM, WARMUP
from vblora.sampling import LengthGroupedSampler
from vblora_experiments import bars

HEAD = ("pooler", "classifier")
Groups = list[dict[str, Any]]  # parameters with their rates, as an optimiser takes them


@dataclass(frozen=True)
class Settings:
    """What decides a result beside the task, the variant and the seed. A run's plan and record have all of it.

    Attributes:
        most_rows: of a task, so that none has most of the steps.
        batch: rows of a step.
        longest: tokens of a row.
        head_rate: learning rate of the head.
        joint_epochs: of the tasks that are trained together.
        epochs: of the unseen task.
        logits_rate: with the bank frozen the logits have all the learning to do.
        refined_rank, refined_rate: q of the refinement U V, and its learning rate.
        small_bank: vectors of 128 numbers by how they are packed: a file of less than 5 kB.
    """

    most_rows: int = 4000
    batch: int = 32
    longest: int = 128
    head_rate: float = 1e-3
    joint_epochs: int = 2
    epochs: int = 3
    logits_rate: float = 0.1
    refined_rank: int = 6
    refined_rate: float = 4e-3
    small_bank: Mapping[str, int] = field(default_factory=lambda: {"int8": 27, "int4": 53})


class Rows(NamedTuple):
    """A task's rows as the model takes them."""

    task: str
    train: Sequence[Any]
    validation: Sequence[Any]
    collate: Callable[[list[Any]], Any]


def encoder(seed: int) -> tuple[nn.Module, Any]:
    """MiniLM with two labels and a new head, drawn from the seed; its own weights are frozen. And its tokenizer."""
    from transformers import AutoTokenizer

    name = find_model(MINILM)
    torch.manual_seed(seed)
    model, _ = load_classifier(name, 2, HEAD, "--model")
    model.requires_grad_(False)
    return with_head(model), AutoTokenizer.from_pretrained(name)


def rows_of(task: str, glue_dir: Path, tokenizer: Any, seed: int, settings: Settings) -> Rows:
    from transformers import DataCollatorWithPadding

    data = load_task(task, glue_dir / TASKS[task].folder, max_train=settings.most_rows, seed=seed)
    training, validation = (
        tokenize(data[part], tokenizer, settings.longest).to_list() for part in ("train", "validation")
    )
    return Rows(task, training, validation, DataCollatorWithPadding(tokenizer))


def train(model: nn.Module, rows: Rows, groups: Groups, seed: int, settings: Settings) -> list[float]:
    """The score after each epoch."""
    steps = steps_of(rows, settings)
    optimizer, schedule = optimising(groups, settings.epochs * steps)
    scores = []
    for epoch in range(settings.epochs):
        model.train()
        for batch in bars.bar(batches(rows, seed, epoch, settings), f"epoch {epoch + 1}", total=steps):
            step(model, batch, optimizer, schedule)
        scores.append(score(model, rows))
    return scores


def train_in_turns(
    model: nn.Module, tasks: Sequence[Rows], groups: Groups, seed: int, settings: Settings
) -> dict[str, float]:
    """Train on the batches of several tasks in a mixed order, each task with a head of its own; the score of each."""
    heads = {rows.task: {name: inside(encoder(seed)[0], name)[1] for name in HEAD} for rows in tasks}
    of_heads = [p for modules in heads.values() for module in modules.values() for p in module.parameters()]
    steps = settings.joint_epochs * sum(steps_of(rows, settings) for rows in tasks)
    optimizer, schedule = optimising([*groups, {"params": of_heads, "lr": settings.head_rate}], steps)
    for epoch in range(settings.joint_epochs):
        mixed = [(rows, batch) for rows in tasks for batch in batches(rows, seed, epoch, settings)]
        random.Random(f"{seed} {epoch}").shuffle(mixed)
        model.train()
        for rows, batch in bars.bar(mixed, f"together, epoch {epoch + 1}"):
            swap_head(model, heads[rows.task])
            step(model, batch, optimizer, schedule)
    scores = {}
    for rows in tasks:
        swap_head(model, heads[rows.task])
        scores[rows.task] = score(model, rows)
    return scores


def optimising(groups: Groups, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, and rates that rise and fall as the recipe's do."""
    from transformers import get_linear_schedule_with_warmup

    optimizer = vblora.AdamW(groups)
    return optimizer, get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * steps), steps)


def step(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    loss = model(**batch).loss
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()}")
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], MAX_GRAD_NORM)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def steps_of(rows: Rows, settings: Settings) -> int:
    """Batches of an epoch, the last one with what is left."""
    return -(-len(rows.train) // settings.batch)


def batches(rows: Rows, seed: int, epoch: int, settings: Settings) -> Iterator[Any]:
    """An epoch's batches of like length."""
    size = settings.batch
    sampler = LengthGroupedSampler([len(row["input_ids"]) for row in rows.train], size, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    return (
        rows.collate([rows.train[at] for at in order[start : start + size]]) for start in range(0, len(order), size)
    )


@torch.no_grad()
def score(model: nn.Module, rows: Rows) -> float:
    """The task's score on the development rows, times 100."""
    model.eval()
    order = sorted(range(len(rows.validation)), key=lambda at: len(rows.validation[at]["input_ids"]))
    logits, labels = [], []
    for start in range(0, len(order), 128):
        batch = rows.collate([rows.validation[at] for at in order[start : start + 128]])
        labels.append(batch["labels"])
        logits.append(model(**batch).logits)
    found = compute_metrics(rows.task, torch.cat(logits).argmax(-1).numpy(), torch.cat(labels).numpy())
    return 100 * found[TASKS[rows.task].metric]


# --- The head -------------------------------------------------------------------------------------------------------


def with_head(model: nn.Module) -> nn.Module:
    """The model with its head trainable: an adapter freezes all beside itself."""
    for name in HEAD:
        inside(model, name)[1].requires_grad_(True)
    return model


def swap_head(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Give the model these modules in the place of its own of the same name."""
    for name, module in modules.items():
        above, _, last = inside(model, name)[0].rpartition(".")
        setattr(model.get_submodule(above), last, module.train(model.training))


def inside(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The path and the module of a model whose last name this is."""
    return next((path, module) for path, module in model.named_modules() if path.split(".")[-1] == name)
