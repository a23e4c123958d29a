"""Training examples per second on CoLA and MRPC, by how rows are padded: to 512, to 128, to their batch's longest,
and that with rows grouped by length.

    python benchmarks/padding.py [--glue_dir DIR] [--rounds 5] [--record results/padding.json]

VB-LoRA (row minilm/.../vblora_all) on the small encoder; forward, backward and optimiser step of batches of 32. Ways
take turns, one batch each in every round, so that what else the machine does hits all of them; a way's figure is
all its rows over all its seconds. Without --glue_dir, generated sentences stand in for CoLA. The scores cannot depend
on padding but by rounding: the largest difference of a development-set logit is printed beside the score both ways.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding, set_seed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "NLU"))

import generate_cola  # noqa: E402
import run_glue  # noqa: E402
from glue_data import load_task, tokenize  # noqa: E402
from glue_tasks import TASKS, compute_metrics, get_task  # noqa: E402
from vblora.groups import param_groups  # noqa: E402
from vblora.io import write_json  # noqa: E402
from vblora.optim import AdamW  # noqa: E402
from vblora.sampling import LengthGroupedSampler  # noqa: E402
from vblora_experiments import bars, commands  # noqa: E402
from vblora_experiments.records import environment  # noqa: E402

BATCH = 32
WAYS = {
    "padded to 512": 512,
    "padded to 128": 128,
    "padded to the batch's longest": None,
    "the same, grouped by length": None,
}
GROUPED = "the same, grouped by length"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue_dir", type=Path, help="folder with CoLA/ and MRPC/")
    parser.add_argument("--rounds", type=int, default=5, help="batches timed for each way")
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, not {options.rounds}")
    with tempfile.TemporaryDirectory() as folder:
        if options.glue_dir is None:
            generate_cola.write(folder, 2000, 200, 0)
            places = {"cola": Path(folder)}
        else:
            places = {task: options.glue_dir / TASKS[task].folder for task in ("cola", "mrpc")}
        results = {task: measure(task, place, options.rounds) for task, place in places.items()}
    print(render(results))
    if options.record:
        write_json(options.record, {"benchmark": "padding", "batch": BATCH, "tasks": results, **environment()})


def measure(task: str, place: Path, rounds: int) -> dict[str, Any]:
    """Examples per second and tokens per example of each way, and what padding does to the development set's score."""
    glue, method, _ = run_glue.parts(run_glue.of({"row": f"minilm/{task}/vblora_all", "data_dir": place}))
    set_seed(0)
    adapted, tokenizer = run_glue.build(glue, method, get_task(task))
    data = load_task(task, place)
    rows = tokenize(data["train"], tokenizer, 512)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = adapted.model.to(device)
    optimizer = AdamW(param_groups(model, 1e-3, **method.rates()))
    lengths = [len(ids) for ids in rows["input_ids"]]
    batches = {way: _batches(rows, lengths, tokenizer, way) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in bars.bar(range(rounds + 1), "rounds"):
        for way in WAYS:
            took = _step(model, optimizer, batches[way](turn), device)
            if turn:  # the first round is to warm up
                seconds[way].append(took)
    speeds = {way: BATCH / float(np.mean(times)) for way, times in seconds.items()}
    return {
        "examples_per_second": speeds,
        "times_padding_to_512": {way: speed / speeds["padded to 512"] for way, speed in speeds.items()},
        "tokens_per_example": {way: _tokens(lengths, way) for way in WAYS},
        "mean_length": float(np.mean(lengths)),
        "development_set": _same_scores(model, data["validation"], tokenizer, task, device),
    }


def _order(lengths: list[int], way: str) -> list[int]:
    """One epoch's order of rows."""
    if way == GROUPED:
        return list(LengthGroupedSampler(lengths, BATCH, seed=0))
    return random.Random(0).sample(range(len(lengths)), len(lengths))


def _collator(tokenizer: Any, way: str) -> DataCollatorWithPadding:
    length = WAYS[way]
    if length is None:
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorWithPadding(tokenizer, padding="max_length", max_length=length)


def _batches(rows: Any, lengths: list[int], tokenizer: Any, way: str) -> Any:
    """A function from a number to a batch of the epoch, the batches spread over all of it."""
    order, collate = _order(lengths, way), _collator(tokenizer, way)
    starts = list(range(0, len(order) - BATCH + 1, BATCH))
    random.Random(1).shuffle(starts)

    def batch(number: int) -> Any:
        at = starts[number % len(starts)]
        return collate([rows[row] for row in order[at : at + BATCH]])

    return batch


def _tokens(lengths: list[int], way: str) -> float:
    """Tokens that the model computes for one example, padding and all, over a whole epoch."""
    fixed = WAYS[way]
    if fixed is not None:
        return float(fixed)
    order = _order(lengths, way)
    batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches) / len(order)


def _step(model: Any, optimizer: Any, batch: Any, device: str) -> float:
    """Seconds of one training step, the batch's way to the device included."""
    model.train()
    began = time.perf_counter()
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def _same_scores(model: Any, dataset: Any, tokenizer: Any, task: str, device: str) -> dict[str, Any]:
    """The score on the development set (its first 512 rows) padded to 128 and to each batch's longest."""
    rows = tokenize(dataset.select(range(min(512, len(dataset)))), tokenizer, 128)
    model.eval()
    logits = {}
    for way in ("padded to 128", "padded to the batch's longest"):
        collate = _collator(tokenizer, way)
        parts = [collate([rows[i] for i in range(at, min(at + 64, len(rows)))]) for at in range(0, len(rows), 64)]
        logits[way] = torch.cat([model(**{n: t.to(device) for n, t in part.items()}).logits.cpu() for part in parts])
    one, other = logits.values()
    metric = get_task(task).metric
    return {
        "metric": metric,
        "scores": {w: compute_metrics(task, z.argmax(-1).numpy(), rows["labels"])[metric] for w, z in logits.items()},
        "largest_difference_of_a_logit": float((one - other).abs().max()),
    }


def render(results: dict[str, Any]) -> str:
    lines = [
        "| task | rows are | tokens per example | examples per second | times padding to 512 |",
        "|---|---|---:|---:|---:|",
    ]
    for task, found in results.items():
        lines += [
            f"| {task} (mean {found['mean_length']:.1f} tokens) | {way} | {found['tokens_per_example'][way]:.1f} "
            f"| {found['examples_per_second'][way]:.1f} | {found['times_padding_to_512'][way]:.1f} |"
            for way in WAYS
        ]
    for task, found in results.items():
        same = found["development_set"]
        scores = ", ".join(f"{score:.4f} {way}" for way, score in same["scores"].items())
        lines.append(
            f"\n{task}: {same['metric']} {scores}; logits differ by at most {same['largest_difference_of_a_logit']:.1e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    commands.run(main, "padding")
