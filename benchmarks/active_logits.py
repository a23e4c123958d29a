"""How many logits of a sub-vector are ever selected in real training, and the bytes that VB-LoRA's training keeps.

    python benchmarks/active_logits.py [--steps 800] [--num_vectors 2048] [--stds 0.01 0.1] [--data_dir DIR]
                                       [--record FILE]

The small encoder on sentences in CoLA's form (generated, or of a folder), all linear layers, r 4, b 128, k 2, batches
of 32, the rates of its rows in NLU/hyperparameters.py with warm-up and linear decay. A logit is active once it has been
selected: it has moments from then on. The table (vblora/logits.py) is as wide as its fullest row needs. Bytes are
logits, their gradient and moments, and indices; PEFT's are four dense tensors in float32.

Last result (results/speed/active_logits.json): 17 of 2,048 entries after 800 steps, 47 at most; 2.9% of PEFT's bytes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)
from turns import report, require_positive

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "NLU"))

import generate_cola  # noqa: E402
import vblora  # noqa: E402
from encoders import find_encoder  # noqa: E402
from glue_data import load_task, tokenize  # noqa: E402
from hyperparameters import TARGETS, row  # noqa: E402
from vblora_experiments import commands  # noqa: E402

LLAMA2_7B = 39_040  # sub-vectors of all linear layers, r 4, b 256
GOAL = 0.05


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--num_vectors", type=int, default=2048, help="h")
    parser.add_argument("--stds", type=float, nargs="+", default=[0.01, 0.1], help="deviation of the initial logits")
    parser.add_argument("--data_dir", help="CoLA's files; sentences are generated unless given")
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    require_positive(options, "steps", "num_vectors")
    rows = read(options.data_dir)
    runs = {str(std): train(rows, std, options) for std in options.stds}
    data = "generated" if options.data_dir is None else "a folder"
    found = {"num_vectors": options.num_vectors, "data": data, "runs": runs}
    report("active_logits", found, render(runs, options.num_vectors), options.record)


def read(data_dir: str | None) -> Any:
    """Tokenised rows for training."""
    with tempfile.TemporaryDirectory() as folder:
        if data_dir is None:
            generate_cola.write(folder, 2000, 20, 0)
        data = load_task("cola", data_dir or folder)
        return tokenize(data["train"], AutoTokenizer.from_pretrained(find_encoder()), 128)


def train(rows: Any, std: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is active after some numbers of steps."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(find_encoder(), num_labels=2)
    optimizer = attach(model.train(), std, options.num_vectors)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * options.steps), options.steps)
    found = []
    marks = {1, 10, 30, 100, 200, 300, 500, options.steps}
    for step, batch in enumerate(endless(rows), start=1):
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in marks:
            found.append({"step": step, **state_of(model.vblora_adapter, optimizer)})
        if step == options.steps:
            return found
    raise AssertionError("the batches have no end")


def attach(model: nn.Module, std: float, num_vectors: int) -> vblora.AdamW:
    numbers = row("minilm/cola/vblora_all")
    config = vblora.VBLoRAConfig(
        r=numbers["rank"],
        topk=numbers["topk"],
        num_vectors=num_vectors,
        vector_length=numbers["vector_length"],
        target_modules=TARGETS["all"],
        modules_to_save=["classifier", "pooler"],
        init_logits_std=std,
    )
    vblora.attach(model, config, seed=0)
    rates = {f"lr_{name}": numbers[f"learning_rate_{name}"] for name in ("vector_bank", "logits")}
    return vblora.AdamW(vblora.param_groups(model, numbers["learning_rate"], **rates, weight_decay=0.1))


def endless(rows: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(find_encoder())
    names = [name for name in rows.column_names if name in ("input_ids", "attention_mask", "token_type_ids", "labels")]
    loader: Any = DataLoader(
        rows.select_columns(names), 32, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer), drop_last=True
    )
    while True:
        yield from loader


def state_of(adapter: vblora.VBLoRA, optimizer: vblora.AdamW) -> dict[str, Any]:
    moments = optimizer.state[adapter.topk_logits]
    active = (moments["exp_avg_sq"] != 0).sum(dim=1).float()
    n, h = adapter.layout.rows, adapter.config.num_vectors
    kept = [*adapter.logits.buffers(), adapter.topk_indices, adapter.topk_logits, *moments.values()]
    once = {t.data_ptr(): t.nbytes for t in kept if isinstance(t, Tensor)}  # the indices are in both
    size = sum(once.values()) + adapter.topk_logits.nbytes  # and the gradient
    return {
        "mean": float(active.mean()),
        "p99": float(active.quantile(0.99)),
        "largest": int(active.max()),
        "width": adapter.logits.width,
        "bytes": size,
        "of_dense": size / (16 * n * h),
        "bytes_a_row": size / n,
    }


def render(runs: dict[str, list[dict[str, Any]]], h: int) -> str:
    lines = [
        "| deviation | steps | active entries of a row, mean | 99th percentile | largest | table | bytes of PEFT's |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for std, found in runs.items():
        lines += [
            f"| {std} | {at['step']} | {at['mean']:.1f} | {at['p99']:.0f} | {at['largest']} | {at['width']} "
            f"| {at['of_dense']:.1%} |"
            for at in found
        ]
    most = max(found[-1]["bytes_a_row"] for found in runs.values())
    return "\n".join(
        [
            *lines,
            "",
            f"At Llama2-7B's shape ({LLAMA2_7B:,} sub-vectors, h {h}), with the wider of these tables: "
            f"{LLAMA2_7B * most / 1e6:.1f} MB; dense: {LLAMA2_7B * 16 * h / 1e6:,.0f} MB. Goal: {GOAL:.0%}.",
        ]
    )


if __name__ == "__main__":
    commands.run(main, "active_logits")
