"""What each setting of the packed form costs and loses: bytes, errors of the factors, and a trained run's score.

    python benchmarks/packed.py [RUN_OR_ADAPTER ...] [--glue_dir DIR] [--record results/packed.json]
    python benchmarks/packed.py --show results/packed_minilm.json    # the scored runs of a record, in one table

RUN is the output folder of NLU/run_glue.py (its best/ is taken) and is scored on the development set; one that was
trained on another's bank (--bank_from) is packed without it. An adapter's folder or packed file by itself is not
scored. Without any, the adapter is RoBERTa-base's query and value (r 4, h 90, b 256) with weights drawn at random:
bytes and errors of such are those of trained ones to some percent.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "NLU"))

import run_glue  # noqa: E402
import table  # noqa: E402
import vblora  # noqa: E402
from encoders import find_model  # noqa: E402
from glue_data import load_task, tokenize  # noqa: E402
from glue_tasks import compute_metrics, get_task  # noqa: E402
from vblora.bank import at_most_one  # noqa: E402
from vblora.files import convert, packed  # noqa: E402
from vblora.io import read_json, write_json  # noqa: E402
from vblora.methods import VBLoRAConfig  # noqa: E402
from vblora.models import (  # noqa: E402
    PLAN_FILE,
    RECORD_FILE,
    read_adapter,
)
from vblora.shapes import LayerShape, sub_vectors  # noqa: E402
from vblora_experiments import commands, records  # noqa: E402

# bank, weights, heads
SETTINGS: list[tuple[str, str | int, str]] = [
    ("lossless", "lossless", "lossless"),
    ("float32", 16, "float32"),
    ("float16", 16, "float16"),
    ("bfloat16", 16, "bfloat16"),
    ("int8", 16, "float16"),
    ("int8", 8, "float16"),
    ("int8", 8, "int8"),
    ("int4", 8, "int8"),
]
SHARED: list[tuple[str, str | int, str]] = [("shared", 16, "float16"), ("shared", 8, "float16")]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="*", metavar="RUN_OR_ADAPTER")
    parser.add_argument("--data_dir", help="the task's files, for all runs; the hub unless given")
    parser.add_argument("--glue_dir", type=Path, help="folder with GLUE's folders, for runs of several tasks")
    parser.add_argument("--model_name_or_path", help="the runs' base model; as in training unless given")
    parser.add_argument("--model", help="the base model, where an adapter's folder names no layers (as vblora pack)")
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    parser.add_argument("--show", type=Path, metavar="RECORD", help="print a record's scored runs and stop")
    options = parser.parse_args(arguments)
    if options.show:
        print(render_runs(read_json(options.show)["adapters"].values()))
        return
    results = {}
    for name in options.adapters:
        print(f"\n{name}\n")
        key = Path(name).resolve().name
        results[key] = measure(*open_adapter(Path(name), options))
        print(render(results[key]))
    if not options.adapters:
        results["RoBERTa-base, query and value, random"] = measure(roberta_like(), None, None)
        print(render(results["RoBERTa-base, query and value, random"]))
    if options.record:
        write_json(options.record, {"benchmark": "packed", "adapters": results, **records.environment()})


def open_adapter(path: Path, options: argparse.Namespace) -> tuple[packed.Content, Any, float | None]:
    """The adapter; a function from a packed file to its score, where there is one; and the run's own best score."""
    if not (path / PLAN_FILE).exists():
        content = read_adapter(path, options.model) if options.model else convert.read_directory(path)
        return content, None, None
    scorer = Scorer(read_json(path / PLAN_FILE), options)
    scores = read_json(path / RECORD_FILE)["scores"]
    content = convert.read_directory(path / "best", scorer.model())
    return content, scorer, scores["best"][scores["metric"]]


class Scorer:
    """The score on the development set of a run's model with a packed adapter."""

    def __init__(self, plan: dict[str, Any], options: argparse.Namespace) -> None:
        self.task = get_task(plan["task"])
        self.has_shared_bank = "bank_from" in plan
        self.name = find_model(options.model_name_or_path or plan["model_name_or_path"])
        self.tokenizer = AutoTokenizer.from_pretrained(self.name)
        length = plan.get("max_length", run_glue.GlueArguments.__dataclass_fields__["max_length"].default)
        place = options.glue_dir / self.task.folder if options.glue_dir else options.data_dir
        data = load_task(self.task.name, place, need_train=False)
        self.rows = tokenize(data["validation"], self.tokenizer, length)

    def model(self) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(self.name, num_labels=self.task.num_labels)

    @torch.no_grad()
    def __call__(self, file: Path) -> float:
        model = self.model()
        vblora.load(model, file)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        collate, outputs, labels = DataCollatorWithPadding(self.tokenizer), [], []
        for at in range(0, len(self.rows), 64):
            rows = [self.rows[row] for row in range(at, min(at + 64, len(self.rows)))]
            batch = collate(rows).to(model.device)
            labels.append(batch.pop("labels").cpu())
            outputs.append(model(**batch).logits.float().cpu())
        logits = torch.cat(outputs)
        guesses = logits.squeeze(-1) if self.task.is_regression else logits.argmax(-1)
        return float(compute_metrics(self.task.name, guesses.numpy(), torch.cat(labels).numpy())[self.task.metric])


def measure(content: packed.Content, score: Any, trained: float | None) -> dict[str, Any]:
    """Each setting's bytes, with the heads and without, its largest error, and its score."""
    alone = dataclasses.replace(content, heads={})
    result: dict[str, Any] = {"peft_bytes": _peft_bytes(content), "peft_bytes_without_heads": _peft_bytes(alone)}
    result |= {"task": score.task.name if score else None, "trained_score": trained, "rows": []}
    for bank, weights, heads in SHARED if score and score.has_shared_bank else SETTINGS:
        if bank in ("int8", "int4") and content.config.method != "vblora":
            continue
        if (bank, heads) == ("int8", "int8") and not content.heads:  # the row before it
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "a.vblora.safetensors"
            size = packed.write(content, file, bank=bank, weights=weights, heads=heads)
            loss = convert.compare(content, packed.read(file))
            row: dict[str, Any] = {"bank": bank, "weights": weights, "heads": heads, "bytes": size}
            row["bytes_without_heads"] = len(packed.dumps(alone, bank=bank, weights=weights))
            row |= loss._asdict() if loss else {}
            row["score"] = score(file) if score else None
            result["rows"].append(row)
    return result


def _peft_bytes(content: packed.Content) -> int:
    """Bytes of the tensors' file of the top-k form, PEFT's where that can hold the adapter."""
    with tempfile.TemporaryDirectory() as folder:
        packed.write(content, Path(folder) / "a")
        convert.unpack(Path(folder) / "a", Path(folder) / "b")
        return (Path(folder) / "b" / "adapter_model.safetensors").stat().st_size


def roberta_like() -> packed.Content:
    names = [f"roberta.encoder.layer.{i}.attention.self.{p}" for i in range(12) for p in ("query", "value")]
    shapes = [LayerShape(name, 768, 768) for name in names]
    config = VBLoRAConfig(r=4, num_vectors=90, vector_length=256, topk=2, target_modules=["query", "value"])
    generator = torch.Generator().manual_seed(0)
    values, indices = torch.randn(sub_vectors(shapes, 4, 256), 90, generator=generator).topk(2)
    bank = 0.02 * torch.randn(90, 256, generator=generator)
    tensors = {"vector_bank": bank, "topk_indices": indices, "topk_weights": at_most_one(values.softmax(-1)[:, :1])}
    return packed.Content(config, shapes, tensors, base_model="roberta-base", init_seed=0)


def render(result: dict[str, Any]) -> str:
    whole, alone = result["peft_bytes"], result["peft_bytes_without_heads"]
    scored = result["rows"][0]["score"] is not None
    lines = [
        f"The top-k form's file: {whole:,} bytes, {alone:,} without heads.\n",
        "| bank | weights | heads | bytes | of the top-k file | without heads | of the top-k file | largest error |"
        + (" score | change |" if scored else ""),
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |" + (" ---: | ---: |" if scored else ""),
    ]
    for row in result["rows"]:
        error = f"{row['largest_error']:.2g}" if "largest_error" in row else ""
        cells = [row["bank"], str(row["weights"]), row["heads"] if whole != alone else ""]
        cells += [f"{row['bytes']:,}", f"{row['bytes'] / whole:.1%}"]
        cells += [f"{row['bytes_without_heads']:,}", f"{row['bytes_without_heads'] / alone:.1%}", error]
        if scored:
            cells += [f"{100 * row['score']:.2f}", f"{100 * (row['score'] - result['rows'][0]['score']):+.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if result["trained_score"] is not None:
        lines.append(f"\nScores are in percent; the run's record has {100 * result['trained_score']:.2f} for best/.")
    return "\n".join(lines)


def render_runs(results: Iterable[dict[str, Any]]) -> str:
    """The scored runs of a record: of each setting the largest share of the top-k file, the largest error, and the
    change of each score against the run's own."""
    groups: dict[tuple[str, str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for run in results:
        for row in run["rows"] if run["task"] else ():
            groups.setdefault((row["bank"], str(row["weights"]), row["heads"]), []).append((run, row))
    if not groups:
        raise ValueError("no scored run in the record: give benchmarks/packed.py the output folders of NLU/run_glue.py")
    tasks = list(dict.fromkeys(run["task"] for group in groups.values() for run, _ in group))
    header = ["bank", "weights", "heads", "of the top-k file", "without heads", "largest error"]
    header += [f"change on {table.TASK_TITLES.get(task, task)}" for task in tasks]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * 3 + " ---: |" * (len(header) - 3)]
    for setting, group in groups.items():
        whole = max(row["bytes"] / run["peft_bytes"] for run, row in group)
        alone = max(row["bytes_without_heads"] / run["peft_bytes_without_heads"] for run, row in group)
        error = max(row["largest_error"] for _, row in group)
        change = {run["task"]: f"{100 * (row['score'] - run['trained_score']):+.2f}" for run, row in group}
        cells = [*setting, f"{whole:.1%}", f"{alone:.1%}", f"{error:.2g}", *(change.get(task, "") for task in tasks)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    commands.run(main, "packed")
