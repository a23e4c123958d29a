"""Training goes on from a small file: from which loss, and where to, beside going on from all logits.

    python benchmarks/going_on.py RUN [--glue_dir DIR] [--steps 40] [--record results/going_on_minilm.json]
    python benchmarks/going_on.py --show results/going_on_minilm.json

RUN is the output folder of NLU/run_glue.py with VB-LoRA. Four copies of its model are trained on for some steps: from
the last checkpoint (all logits), from best/ (the top-k form), and from two packed files of that; on the same batches
with the same dropout, at a quarter of the run's rates, with a new optimiser. Where the best epoch is not the last one
the checkpoint is of another epoch, and left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "NLU"))

import run_glue  # noqa: E402
import vblora  # noqa: E402
from encoders import find_model  # noqa: E402
from glue_data import load_task, tokenize  # noqa: E402
from glue_tasks import compute_metrics, get_task  # noqa: E402
from vblora.files.convert import pack_directory  # noqa: E402
from vblora.io import read_json, write_json  # noqa: E402
from vblora.models import PLAN_FILE, RECORD_FILE  # noqa: E402
from vblora_experiments import bars, commands, records, runs  # noqa: E402

PACKED: dict[str, dict[str, Any]] = {
    "packed, lossless": {},
    "packed, int8, weights 8 bits, head float16": {"bank": "int8", "weights": 8, "heads": "float16"},
}
SOURCES = ("all logits", "top-k form", *PACKED)
SHARE = 0.25  # of the run's rates: its schedule has ended near 0
BATCH = 32


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN")
    parser.add_argument("--data_dir", help="the task's files; the hub unless given")
    parser.add_argument("--glue_dir", type=Path, help="folder with GLUE's folders")
    parser.add_argument("--model_name_or_path", help="the run's base model; as in training unless given")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    parser.add_argument("--show", type=Path, metavar="RECORD", help="print a record's table and stop")
    options = parser.parse_args(arguments)
    if options.show:
        print(render(read_json(options.show)))
        return
    if options.run is None:
        raise ValueError("a run is needed: the output folder of NLU/run_glue.py")
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, not {options.steps}")
    plan, record = read_json(options.run / PLAN_FILE), read_json(options.run / RECORD_FILE)
    if plan["method"] != "vblora":
        raise ValueError(f"{options.run} is a run of {plan['method']}, not of vblora")
    trial = Trial(plan, options)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = {"top-k form": options.run / "best"}
        checkpoint = runs.last_checkpoint(options.run)
        if checkpoint is not None and record["scores"]["best"]["epoch"] == record["scores"]["last"]["epoch"]:
            sources = {"all logits": Path(checkpoint), **sources}
        for number, (name, settings) in enumerate(PACKED.items()):
            sources[name] = Path(folder) / f"{number}.vblora.safetensors"
            pack_directory(options.run / "best", sources[name], model=trial.model(), **settings)
        for name, source in sources.items():
            rows[name] = trial.go_on(source, options.steps)
    best = record["scores"]["best"]
    result = {"task": trial.task.name, "metric": trial.task.metric, "steps": options.steps, "share_of_rates": SHARE}
    result |= {"run_loss": best["loss"], "run_score": best[trial.task.metric], "from": rows}
    print(render(result))
    if options.record:
        write_json(options.record, {"benchmark": "going_on", **result, **records.environment()})


class Trial:
    """The run's model and data."""

    def __init__(self, plan: dict[str, Any], options: argparse.Namespace) -> None:
        self.plan, self.task = plan, get_task(plan["task"])
        self.name = find_model(options.model_name_or_path or plan["model_name_or_path"])
        tokenizer = AutoTokenizer.from_pretrained(self.name)
        self.collate = DataCollatorWithPadding(tokenizer)
        length = plan.get("max_length", run_glue.GlueArguments.__dataclass_fields__["max_length"].default)
        place = options.glue_dir / self.task.folder if options.glue_dir else options.data_dir
        data = load_task(self.task.name, place, max_train=plan.get("max_train_samples"), seed=plan.get("seed", 42))
        self.train = tokenize(data["train"], tokenizer, length)
        self.held_out = tokenize(data["validation"], tokenizer, length)

    def model(self) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(self.name, num_labels=self.task.num_labels)

    def go_on(self, source: Path, steps: int) -> dict[str, float]:
        """Train on from a file; the losses and scores before and after."""
        model = self.model()
        adapter = vblora.load(model, source, trainable=True)
        before = adapter.topk_indices.clone()
        rates = {n: SHARE * self.plan[f"learning_rate{n}"] for n in ("", "_vector_bank", "_logits")}
        optimizer = vblora.AdamW(
            vblora.param_groups(model, lr=rates[""], lr_vector_bank=rates["_vector_bank"], lr_logits=rates["_logits"])
        )
        loss, score = self.evaluate(model)
        result = {"loss_before": loss, "score_before": score}
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0)).tolist()
        torch.manual_seed(0)  # of dropout
        losses = []
        model.train()
        for step in bars.bar(range(steps), "training"):
            rows = [self.train[order[(step * BATCH + i) % len(order)]] for i in range(BATCH)]
            batch_loss = model(**self.collate(rows)).loss
            batch_loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(batch_loss.item())
        loss, score = self.evaluate(model)
        changed = (before.sort().values != adapter.topk_indices.sort().values).any(1).sum()
        result |= {"first_batch_loss": losses[0], "last_batches_loss": sum(losses[-10:]) / len(losses[-10:])}
        return result | {"loss_after": loss, "score_after": score, "selections_changed": int(changed)}

    @torch.no_grad()
    def evaluate(self, model: Any) -> tuple[float, float]:
        """Mean loss and score on the development set."""
        model.eval()
        outputs, labels = [], []
        for at in range(0, len(self.held_out), 64):
            batch = self.collate([self.held_out[row] for row in range(at, min(at + 64, len(self.held_out)))])
            labels.append(batch.pop("labels"))
            outputs.append(model(**batch).logits)
        logits, truth = torch.cat(outputs), torch.cat(labels)
        scores = compute_metrics(self.task.name, logits.argmax(-1).numpy(), truth.numpy())
        return cross_entropy(logits, truth).item(), float(scores[self.task.metric])


def render(result: dict[str, Any]) -> str:
    lines = [
        "| going on from | loss before | first batch | last batches | loss after | score before | after |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in SOURCES:  # a record's keys are sorted
        if (row := result["from"].get(name)) is None:
            continue
        losses = [row[key] for key in ("loss_before", "first_batch_loss", "last_batches_loss", "loss_after")]
        scores = [100 * row[key] for key in ("score_before", "score_after")]
        cells = [name, *(f"{loss:.4f}" for loss in losses), *(f"{score:.2f}" for score in scores)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    commands.run(main, "going_on")
