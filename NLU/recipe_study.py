"""VB-LoRA by the recipe, by plain settings, and LoRA, at equal steps: docs/recipe.md's tables, from their runs.

    ./scripts/reproduce.sh recipe --seeds 0 1 2 3 4                      # the quick start's sentences
    ./scripts/reproduce.sh recipe --tasks cola mrpc --glue_dir GLUE      # GLUE's folders CoLA, MRPC, ... in GLUE
    ./scripts/reproduce.sh recipe --rows recipe lora --epochs 3
    ./scripts/reproduce.sh recipe --records results/recipe --no_runs     # the table again, from kept records
    ./scripts/reproduce.sh recipe --records results/recipe --no_runs --epochs 3 6 --picture docs/figures/recipe.png
    ./scripts/reproduce.sh recipe --records results/recipe --no_runs --tasks cola --picture FILE --over steps bytes

A run that has a record is not run again, one that was interrupted goes on. --collect copies the records into a folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import generate_cola
import paired
import quickstart
import recipe_curves
from glue_tasks import TASKS
from hyperparameters import row as flags_of
from vblora.io import read_json, replacing
from vblora_experiments import bars, commands, records, runs, tables

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "recipe"
SENTENCES = "sentences"  # the quick start's

Flags = Mapping[str, Any]
PLAIN: Flags = {  # the quick start's settings before there was a recipe
    "method": "vblora",
    "num_vectors": 90,
    "vector_length": 128,
    "topk": 2,
    "init_logits_std": 0.01,
    "learning_rate_vector_bank": 5e-3,
    "learning_rate_logits": 1e-2,
}
RECIPE: Flags = {"method": "vblora", "recipe": True}
SMALL = 58_980  # bytes: a fifth of the numbers that LoRA r 8 has on query and value
ROOT_DECAY: Flags = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 0.5, "lr_end": 0.0}}
# By name. "lora" and "lora_qv" have the settings of the quick start and of MiniLM's row; the others all layers, rank 4.
ROWS: dict[str, Flags] = {
    "lora": {"method": "lora", "lora_alpha": 4, "learning_rate_adapter": 2e-3},
    "lora_qv": {"method": "lora", "targets": "qv", "rank": 8, "lora_alpha": 16, "learning_rate_adapter": 1e-3},
    "plain": PLAIN,
    "plain_h240": {**PLAIN, "num_vectors": 240},
    "vblora_all": {**PLAIN, "learning_rate_vector_bank": 4e-3},  # MiniLM's row of that name: the paper's settings
    "recipe": RECIPE,
    "recipe_small": {**RECIPE, "recipe_bytes": SMALL},
    # The rates fall as the root of the share of the steps that is left, not linearly.
    "recipe_root": {**RECIPE, **ROOT_DECAY},
    "recipe_small_root": {**RECIPE, "recipe_bytes": SMALL, **ROOT_DECAY},
    # One thing taken out of the recipe, or put in, at as many bytes.
    "recipe_r3": {**RECIPE, "rank": 3, "recipe_bytes": 131_856},  # the bytes of "recipe"
    "recipe_k2": {**RECIPE, "topk": 2},
    "recipe_k3": {**RECIPE, "topk": 3},
    "recipe_undivided": {**RECIPE, "init_vectors_of_a": 0},
    "recipe_undivided_k2": {**RECIPE, "init_vectors_of_a": 0, "topk": 2},
    "recipe_by_kind": {**RECIPE, "init_by_kind": True},
    "recipe_rate_2e-3": {**RECIPE, "learning_rate_vector_bank": 2e-3},
    "recipe_rate_5e-3": {**RECIPE, "learning_rate_vector_bank": 5e-3},
    "recipe_small_rate_1e-3": {**RECIPE, "recipe_bytes": SMALL, "learning_rate_vector_bank": 1e-3},
    "recipe_small_rate_2e-3": {**RECIPE, "recipe_bytes": SMALL, "learning_rate_vector_bank": 2e-3},
    "recipe_small_rate_5e-3": {**RECIPE, "recipe_bytes": SMALL, "learning_rate_vector_bank": 5e-3},
}
DEFAULT_ROWS = ("lora", "plain", "recipe")


def flags(task: str, name: str, epochs: float, seed: int, data: Path, out: Path) -> dict[str, Any]:
    """The flags of run_glue.py for one run."""
    return flags_with(ROWS[name], task, epochs, seed, data, out)


def flags_with(changes: Flags, task: str, epochs: float, seed: int, data: Path, out: Path) -> dict[str, Any]:
    """A task's common flags under these changes; a change to None takes a flag away."""
    if task == SENTENCES:
        common = dict(quickstart.COMMON)
    else:  # MiniLM's row for the task, without what is its method's
        full = flags_of(f"minilm/{task}/full")
        kept = ("max_length", "weight_decay", "warmup_steps", "per_device_train_batch_size", "max_train_samples")
        common = {flag: full[flag] for flag in kept if flag in full}
        head = flags_of(f"minilm/{task}/lora_qv")["head"]
        common |= {"task": task, "targets": "all", "rank": 4, "learning_rate": 1e-3, "head": head}
    places = {"model_name_or_path": quickstart.MINILM, "data_dir": data, "output_dir": out}
    values = {**places, **common, **changes, "num_train_epochs": epochs, "seed": seed}
    return {flag: value for flag, value in values.items() if value is not None}


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.search is not None:
        print(search_table(read_json(options.search)))
        return
    keys = [
        (task, epochs, name, seed)
        for seed in options.seeds
        for task in options.tasks
        for epochs in options.epochs
        for name in options.rows
    ]
    found = (
        {key: run(key, options) for key in bars.bar(keys, "runs")}
        if options.records is None
        else kept(keys, options.records)
    )
    there = {key: record for key, record in found.items() if record is not None}
    print(table(there, options.against))
    if options.picture is not None:
        recipe_curves.draw(there, options.over, options.picture)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["recipe"])
    parser.add_argument("--tasks", nargs="+", choices=[SENTENCES, *TASKS], default=[SENTENCES])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(DEFAULT_ROWS), metavar="ROW")
    parser.add_argument("--epochs", nargs="+", type=int, default=[3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--glue_dir", type=Path, help="folder with GLUE's folders (CoLA, MRPC...)")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--collect", type=Path, help="copy the records into this folder")
    parser.add_argument("--against", choices=ROWS, metavar="ROW", help="compare each row with this one, seed by seed")
    parser.add_argument("--search", type=Path, help="print the record of the search for the recipe, and no more")
    parser.add_argument("--picture", type=Path, help="draw the scores into this file, .png, .svg or .pdf")
    parser.add_argument("--over", nargs="+", choices=recipe_curves.OVER, default=["epochs"], help="of --picture")
    parser.add_argument("--records", type=Path, nargs="+", help="print the table from the records in these folders")
    parser.add_argument("--no_runs", action="store_true", help="with --records: nothing is run")
    options = commands.one_line_errors(parser).parse_args(arguments)
    commands.check_kept_records(options)
    if options.against is not None and options.against not in options.rows:
        raise ValueError(f"--against {options.against} is none of --rows: {' '.join(options.rows)}")
    if options.tasks != [SENTENCES] and options.glue_dir is None and options.records is None:
        raise ValueError("GLUE's tasks need --glue_dir, the folder with GLUE's folders")
    if options.picture is not None and options.picture.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{options.picture}: its name must end with .png, .svg or .pdf")
    return options


Key = tuple[str, int, str, int]  # task, epochs, row, seed


def name_of(key: Key) -> str:
    task, epochs, name, seed = key
    return f"{task}_e{epochs}_{name}_seed{seed}"


def run(key: Key, options: argparse.Namespace) -> dict[str, Any]:
    """One run's record."""
    task, epochs, name, seed = key
    data = options.runs / SENTENCES if task == SENTENCES else options.glue_dir / TASKS[task].folder
    out = options.runs / name_of(key)
    return train(flags(task, name, epochs, seed, data, out), options.collect)


def train(values: Flags, collect: Path | None) -> dict[str, Any]:
    """The record of a run with these settings of run_glue.py, which is copied into the folder `collect`."""
    import run_glue  # takes seconds, as transformers does

    data, out = Path(values["data_dir"]), Path(values["output_dir"])
    if data.name == SENTENCES and not (data / "train.tsv").exists():
        generate_cola.write(data, train=2000, dev=500, seed=0, phenomena=quickstart.PHENOMENA)
    record = run_glue.run(run_glue.of(values))
    if collect is not None:
        with replacing(collect / f"{out.name}.json") as temporary:
            shutil.copyfile(out / records.RECORD_FILE, temporary)
    return record


def kept(keys: Sequence[Key], folders: Sequence[Path]) -> dict[Key, dict[str, Any] | None]:
    """The records of these runs in the first folder that has them; None for one that is missing.

    A run that is MiniLM's row as it stands may be kept as the tables of `reproduce.sh table1` keep it.
    """
    found: dict[Key, dict[str, Any] | None] = {}
    for key in keys:
        task, epochs, name, seed = key
        names = (name_of(key), f"minilm_{task}_{name}_seed{seed}")
        paths = [folder / f"{one}.json" for folder in folders for one in names]
        there = (read_kept(path, ROWS[name], seed, DECIDE) for path in paths if path.exists())
        found[key] = next((r for r in there if r["settings"].get("num_train_epochs", epochs) == epochs), None)
    return found


DECIDE = {flag for row in ROWS.values() for flag in row} - {"rank", "targets"}  # which have a value in every run


def read_kept(path: Path, row: Flags, seed: int, decide: Set[str] = frozenset()) -> dict[str, Any]:
    """A kept record of a row. Flags that `decide` which row it is must be the row's; of others those that both have.

    Raises:
        ValueError: it is damaged, or a setting of it is not the row's.
    """
    record: dict[str, Any] = read_json(path)
    shape = records.RECORD | records.OF_EXPERIMENT["glue"] | {"steps": int}
    records.require_whole(path, record, shape)
    settings = {**record["settings"], "seed": record["seed"]}
    wanted = {"seed": seed, **row}
    known = {name: value for name, value in settings.items() if name in wanted or (name in decide and value)}
    changed = runs.in_words(known, {name: value for name, value in wanted.items() if name in settings})
    if changed:
        raise ValueError(f"{path} is no record of this row ({changed})")
    return record


SEARCHED = {
    "rank": "r",
    "num_vectors": "h",
    "vector_length": "b",
    "topk": "k",
    "share_of_a": "A's share",
    "init_vector_bank_bound": "bound",
    "init_logits_std": "deviation",
    "learning_rate_vector_bank": "rate",
    "learning_rate_logits": "logits' rate",
    "learning_rate_adapter": "LoRA's rate",
    "equal_use": "equal use",
    "frozen_a": "A frozen",
    "equal_gradients": "equal gradients",
    "by_gradient": "by gradient",
    "rows_apart": "rows apart",
    "signs": "signs",
    "isometric": "isometric",
    "learned_weights": "weights' rate",
    "learned_scales": "scales' rate",
    "schedule": "rates fall",
    "adam_beta2": "beta2",
}


def search_table(search: Mapping[str, Any]) -> str:
    """The settings that were tried on the sentences, the best last, with each seed's score at the last epoch."""
    names = [name for name in SEARCHED if any(name in one["settings"] for one in search["runs"])]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in search["runs"]:
        settings = {name: one["settings"].get(name, "") for name in names}
        groups.setdefault(json.dumps([one["method"], settings]), []).append(one)
    lines = []
    for group in sorted(groups.values(), key=lambda group: mean(one["matthews_correlation"][-1] for one in group)):
        values = [group[0]["settings"].get(name, "") for name in names]
        scores = [100 * one["matthews_correlation"][-1] for one in sorted(group, key=lambda one: one["seed"])]
        shown = [value if isinstance(value, str) else f"{value:g}" for value in values]
        stored = f"{group[0]['stored_parameters']:,}"
        lines.append([group[0]["method"], *shown, stored, " ".join(f"{score:.1f}" for score in scores)])
    titles = [SEARCHED[name] for name in names]
    return tables.render(["method", *titles, "stored numbers", "seeds"], lines, "markdown")


Group = tuple[str, int, str]  # task, epochs, row


def table(found: Mapping[Key, Mapping[str, Any]], against: str | None = None) -> str:
    """Mean and standard deviation over the seeds of the score at the last epoch, times 100, and the mean at the best.

    With `against` the differences from that row, paired by seed: mean, 95% interval, and p adjusted by Holm over the
    table's tests.
    """
    groups: dict[Group, dict[int, Mapping[str, Any]]] = {}
    for (task, epochs, name, seed), record in found.items():
        groups.setdefault((task, epochs, name), {})[seed] = record
    header = ["task", "epochs", "steps", "method", "stored numbers", "mean ± sd", "seeds", "best epoch"]
    lines = [line_of(group, records) for group, records in groups.items()]
    if against is not None:
        header += [f"difference from {against}", "p", "what the test carries"]
        more = compared({group: scores_of(records) for group, records in groups.items()}, against)
        lines = [line + list(columns) for line, columns in zip(lines, more, strict=True)]
    return tables.render(header, lines, "markdown")


def line_of(group: Group, records: Mapping[int, Mapping[str, Any]]) -> list[str]:
    task, epochs, name = group
    first, scores = next(iter(records.values())), list(scores_of(records).values())
    return [
        f"{task} ({first['scores']['metric'].replace('_', ' ')})",
        str(epochs),
        str(first["steps"]),
        name,
        f"{first['stored_parameters']['parameters']:,}",
        tables.number(mean(scores), stdev(scores) if len(scores) > 1 else None),
        " ".join(f"{score:.1f}" for score in scores),
        tables.number(mean(scores_of(records, "best").values())),
    ]


def scores_of(records: Mapping[int, Mapping[str, Any]], epoch: str = "last") -> dict[int, float]:
    """By seed, the score at the last or the best epoch, times 100."""
    return {seed: 100 * record["scores"][epoch][record["scores"]["metric"]] for seed, record in records.items()}


def compared(scores: Mapping[Group, Mapping[int, float]], against: str) -> list[tuple[str, str, str]]:
    """The columns of `paired` for each group, from the row it is compared with on the same task and epochs."""
    differences = []
    for group, own in scores.items():
        other = scores.get((*group[:2], against))
        differences.append(None if other is None or group[2] == against else paired.difference(own, other))
    return paired.columns(differences)


if __name__ == "__main__":
    commands.run(main, "recipe_study")
