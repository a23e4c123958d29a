"""One bank for many tasks: trained on several at once, then frozen for a task that it has not seen.

    ./scripts/reproduce.sh many --glue_dir GLUE                              # docs/recipe.md's table: runs, then prints
    ./scripts/reproduce.sh many --glue_dir GLUE --unseen sst2 --seeds 0 1 2
    ./scripts/reproduce.sh many --records results/many --no_runs             # the table again, from kept records

GLUE holds the folders CoLA, MRPC, SST-2 and QNLI. For each unseen task a bank is trained on the other three, whose
batches come in turns, each with a head of its own and all with one selection (VB-LoRA by the recipe with k 2). Then
that bank is frozen, and the unseen task has

    own         a bank of its own, by the recipe as it stands
    selection   the frozen bank; its own selection is learned, from where the three tasks left it
    refined     the frozen bank and selection; the bank is refined by U V, U (h, q) from zero and V (q, b)
    added       the frozen bank and selection; a small bank of its own is added, of vectors in 8 bits at drawn places
    small       that small bank alone, without the other tasks'
    added_int4, small_int4   the same with twice as many vectors, in 4 bits
    head        the frozen bank and selection as they are: a head alone
    lorashare   LoRA of the recipe's rank, projected by the package lorashare onto the components of the other three
                tasks' LoRA adapters; `lora` is the same before it

Every run has the same loop, steps and head (many_loop.py; the variants: many_variants.py). A run that has a record is
not run again; one of other settings, another model or other rows in the same folder is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

import many_loop
import paired
from encoders import find_model
from glue_data import load_task
from glue_tasks import TASKS
from many_loop import Settings
from many_variants import ON_THE_BANK, TOGETHER, VARIANTS, Run, lora_in, together_in, train_lora, train_together
from vblora.io import folder_fingerprint, read_json, write_json
from vblora_experiments import bars, commands, runs, tables
from vblora_experiments.records import environment, require_whole

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "many"
LORASHARE = "the package lorashare is missing: pip install --no-deps lorashare==0.1.3, or give --variants"
Record = Mapping[str, Any]


class Key(NamedTuple):
    unseen: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.unseen}_{self.variant}_seed{self.seed}"


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    keys = [Key(*key) for key in ((t, v, s) for s in options.seeds for t in options.unseen for v in options.variants)]
    print(table(dict(kept(keys, options.records) if options.no_runs else Study(options).run_all(keys))))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["many"])
    parser.add_argument("--unseen", nargs="+", choices=TOGETHER, default=["sst2", "mrpc", "cola"], metavar="TASK")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--glue_dir", type=Path, help="folder with GLUE's folders CoLA, MRPC, SST-2 and QNLI")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where adapters and records go")
    parser.add_argument("--collect", type=Path, help="copy the records into this folder")
    parser.add_argument("--records", type=Path, help="print the table from the records in this folder")
    parser.add_argument("--no_runs", action="store_true", help="with --records: nothing is run")
    options = commands.one_line_errors(parser).parse_args(arguments)
    commands.check_kept_records(options)
    if options.glue_dir is None and not options.no_runs:
        raise ValueError("the tasks need --glue_dir, the folder with GLUE's folders")
    if "lorashare" in options.variants and not options.no_runs and importlib.util.find_spec("lorashare") is None:
        raise ValueError(LORASHARE)
    return options


# --- Runs ---------------------------------------------------------------------------------------------------------


class Study:
    """The runs of this table in one folder, each in a folder of its own with its plan and its record."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.glue_dir, self.runs, self.collect = options.glue_dir, options.runs, options.collect
        self.settings = settings = Settings()
        model = find_model(many_loop.MINILM)
        self.plan = {
            **dataclasses.asdict(settings),
            "model_name_or_path": many_loop.MINILM,
            "model_fingerprint": folder_fingerprint(Path(model)) if Path(model).is_dir() else None,
            "rows": {task: load_task(task, self.glue_dir / TASKS[task].folder).fingerprint for task in TOGETHER},
        }

    def run_all(self, keys: Sequence[Key]) -> Iterator[tuple[Key, Record]]:
        for key in bars.bar(keys, "runs"):
            self.prepare(key)
            yield key, self.once(self.runs / key.name, key._asdict(), partial(self.train, key))

    def prepare(self, key: Key) -> None:
        """Train what the run starts from. Before it, so that a run draws the same numbers whether that was there."""
        if key.variant in ON_THE_BANK:
            folder, of_run = together_in(self.runs, key.unseen, key.seed), {"without": key.unseen, "seed": key.seed}
            places = (self.runs, self.glue_dir, self.settings)
            self.once(folder, of_run, partial(train_together, key.unseen, key.seed, *places))
        for task in {"lora": (key.unseen,), "lorashare": TOGETHER}.get(key.variant, ()):
            folder, of_run = lora_in(self.runs, task, key.seed), {"lora": task, "seed": key.seed}
            self.once(folder, of_run, partial(self.train_lora, task, key.seed))

    def once(self, folder: Path, of_run: Mapping[str, Any], train: Callable[[], Record]) -> Record:
        """The record of a run, which is trained unless its folder has it.

        Raises:
            ValueError: the folder has a run of another plan.
        """
        record = runs.begin(folder, {**self.plan, **of_run})
        if record is None:
            record = {**of_run, **train(), "settings": self.plan, **environment()}
            runs.finish(folder, record)
        if self.collect is not None:
            write_json(self.collect / f"{folder.name}.json", record)
        return record

    def train(self, key: Key) -> dict[str, Any]:
        run = self.start(key.unseen, key.seed)
        return {"rows": len(run.rows.train), **VARIANTS[key.variant](run)}

    def train_lora(self, task: str, seed: int) -> dict[str, Any]:
        return train_lora(self.start(task, seed))

    def start(self, task: str, seed: int) -> Run:
        model, tokenizer = many_loop.encoder(seed)
        rows = many_loop.rows_of(task, self.glue_dir, tokenizer, seed, self.settings)
        torch.manual_seed(seed)
        return Run(model, rows, seed, self.runs, self.settings)


def kept(keys: Sequence[Key], folder: Path) -> Iterator[tuple[Key, Record]]:
    """The records of these runs that a folder has."""
    for key in keys:
        path = folder / f"{key.name}.json"
        if path.exists():
            record = read_json(path)
            require_whole(path, record, {"unseen": str, "variant": str, "seed": int, "scores": list, "bytes": int})
            if fault := next((f"{n} is {record[n]}" for n, value in key._asdict().items() if record[n] != value), None):
                raise ValueError(f"{path} is no record of this run: {fault}")
            if not record["scores"] or not all(isinstance(score, (int, float)) for score in record["scores"]):
                raise ValueError(f"{path} has no scores, but {record['scores']!r:.80}")
            yield key, record


# --- The table ------------------------------------------------------------------------------------------------------


def table(found: Mapping[Key, Record]) -> str:
    """Score after the last epoch, times 100, by unseen task and variant; differences from its own bank by seed."""
    groups: dict[tuple[str, str], dict[int, Record]] = {}
    for key, record in found.items():
        groups.setdefault((key.unseen, key.variant), {})[key.seed] = record
    scores = {group: {seed: r["scores"][-1] for seed, r in records.items()} for group, records in groups.items()}
    order = sorted(groups, key=lambda group: (TOGETHER.index(group[0]), list(VARIANTS).index(group[1])))
    differences = [
        None if variant == "own" else paired.difference(scores[task, variant], scores.get((task, "own"), {}))
        for task, variant in order
    ]
    lines = [
        line_of(*group, groups[group], scores[group], columns)
        for group, columns in zip(order, paired.columns(differences), strict=True)
    ]
    header = ["unseen task", "adapter", "bytes", "mean ± sd", "seeds", "from own", "p", "what the test carries"]
    return tables.render(header, lines, "markdown")


def line_of(
    task: str, variant: str, records: Mapping[int, Record], scores: Mapping[int, float], columns: Sequence[str]
) -> list[str]:
    sizes = {record["bytes"] for record in records.values()}
    values = [scores[seed] for seed in sorted(scores)]
    shown = tables.number(mean(values), stdev(values) if len(values) > 1 else None)
    size = " to ".join(f"{one:,}" for one in sorted({min(sizes), max(sizes)}))
    return [task, variant, size, shown, " ".join(f"{value:.1f}" for value in values), *columns]


if __name__ == "__main__":
    commands.run(main, "many_tasks")
