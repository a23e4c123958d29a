"""Methods at the bytes of the recipe's adapter, each with its own small search of rates: docs/field.md's tables.

    ./scripts/reproduce.sh field                                         # the search, five seeds, the table
    ./scripts/reproduce.sh field --rows recipe uni_lora --seeds 0 1 2
    ./scripts/reproduce.sh field --measure results/field/steps.json      # sizes and seconds a step of all, in turns
    ./scripts/reproduce.sh field --records results/field --no_runs       # the tables again, from kept records

The quick start's encoder and sentences, all linear layers of its blocks, batches of 32. Each row's search has three
rates, half, once and twice its middle one, and while the best stands at an end one more beyond it. The rate with the
best mean score at the last epoch of the runs on --search_seeds is trained with on --seeds, which the search does not
see. A run that has a record is not run again, one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import generate_cola
import paired
import quickstart
import recipe_study
from recipe_study import SENTENCES, Flags
from vblora.io import read_json, write_json
from vblora_experiments import bars, commands, tables
from vblora_experiments.records import environment

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "field"
STEPS_FILE = "steps.json"
REFERENCE = "recipe"
FIRST, MOST = range(-1, 2), 8  # doublings of the middle rate that a search begins with, and how many it has
EVERY = range(-MOST, MOST + 1)
STATE = 16  # bytes of a trained number with its gradient and AdamW's two moments, all in float32


class Row(NamedTuple):
    """A method, in the size that comes nearest to the recipe's bytes from below where it can.

    Attributes:
        flags: of run_glue.py, beside the quick start's.
        middle: where the search of the flag `rate` begins.
        note: where the size is another.
    """

    flags: Flags
    middle: float
    rate: str = "learning_rate_adapter"
    note: str = ""

    def rates(self, at: Iterable[int]) -> list[float]:
        """The rates so many doublings above the middle one."""
        return [self.middle * 2.0**n for n in at]


def _peft(method: str, middle: float, note: str = "", **settings: Any) -> Row:
    """A method of PEFT's whose size is in its settings. What --rank would set is there too."""
    flags = {"method": method, "rank": settings.pop("r", None)}
    if settings:
        flags["method_settings"] = json.dumps(settings)
    return Row(flags, middle, note=note)


# r 1 on query, value and both layers of the MLP.
SOME = r".*(query|value|intermediate\.dense|\d\.output\.dense)"
ROWS: dict[str, Row] = {
    "recipe": Row({"method": "vblora", "recipe": True}, 4e-3, "learning_rate_vector_bank"),
    "lora_r4": Row({"method": "lora", "lora_alpha": 4}, 2e-3, note="five times the bytes"),
    "lora_r1": Row(
        {"method": "lora", "rank": 1, "lora_alpha": 1, "targets": SOME},
        2e-3,
        note="not on key and attention.output",
    ),
    "uni_lora": _peft("unilora", 1e-2, r=4, theta_d_length=32_964),
    # Of its paper's rank, 2, its numbers move four of each layer's; of rank 30 as many as there are numbers.
    "tiny_lora": _peft("tinylora", 1e-2, "four directions in each layer", r=2, u=915, save_projection=False),
    "tiny_lora_r30": _peft("tinylora", 1e-3, r=30, u=900, save_projection=False),
    "vera": _peft("vera", 1e-2, r=339, save_projection=False),
    "pvera": _peft("pvera", 1e-2, r=169, save_projection=False),
    "rand_lora": _peft("randlora", 2e-3, "one basis, of full rank", r=384, save_projection=False),
    "fourier_ft": _peft("fourierft", 5e-2, n_frequency=915),
    "wave_ft": _peft("waveft", 2e-3, n_frequency=915),
    "beft": _peft("beft", 5e-3, "it has no size to choose"),
    "psoft": _peft("psoft", 2e-3, r=41),
    "c3a": _peft("c3a", 5e-2, block_size=384),
    "lora_xs": Row({"method": "lora_xs", "rank": 30, "lora_alpha": 30}, 4e-3),
    "tied_lora": Row({"method": "tied_lora", "rank": 1, "lora_alpha": 1}, 2e-3),
}
Key = tuple[int, str, float, int]  # epochs, row, rate, seed
Found = Mapping[Key, Mapping[str, Any]]


def changes(name: str, rate: float) -> dict[str, Any]:
    """What a run of this row has beside the quick start's flags."""
    row = ROWS[name]
    return {**row.flags, row.rate: rate}


def name_of(key: Key) -> str:
    epochs, name, rate, seed = key
    return f"{SENTENCES}_e{epochs}_{name}_rate{rate:g}_seed{seed}"


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.measure is not None:
        before = read_json(options.measure).get("rows", {}) if options.measure.exists() else {}
        write_json(
            options.measure, {"benchmark": "field", "rows": {**before, **measure(options.rows)}, **environment()}
        )
        return
    source = options.records if options.records is not None else options.runs
    found = dict(kept(options, source)) if options.no_runs else run_all(options)
    steps_file = source / STEPS_FILE
    steps = read_json(steps_file)["rows"] if steps_file.exists() else {}
    print(table(found, options, steps) if options.table == "scores" else search_table(found, options))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["field"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--search_seeds", nargs="+", type=int, default=[10])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--collect", type=Path, help="copy the records into this folder")
    parser.add_argument("--measure", type=Path, help="measure sizes and steps into this file, beside what it has")
    parser.add_argument("--table", choices=["scores", "search"], default="scores")
    parser.add_argument("--records", type=Path, help="print the table from the records in this folder")
    parser.add_argument("--no_runs", action="store_true", help="with --records: nothing is run")
    options = commands.one_line_errors(parser).parse_args(arguments)
    commands.check_kept_records(options)
    options.rows = list(dict.fromkeys(options.rows))  # named twice, a row would count twice among the tests
    if shared := sorted(set(options.search_seeds) & set(options.seeds)):
        raise ValueError(
            f"seed {shared[0]} is in --search_seeds and --seeds: the search must not see the seeds of the table"
        )
    return options


# --- Runs ---------------------------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace) -> dict[Key, dict[str, Any]]:
    """Row by row the search, then the best rate on the seeds of the table."""
    found: dict[Key, dict[str, Any]] = {}
    for name in bars.bar(options.rows, "rows"):
        best = search(name, found, options)
        for seed in bars.bar(options.seeds, f"{name}, seeds"):
            key = (options.epochs, name, best, seed)
            found[key] = run(key, options)
    return found


def search(name: str, found: dict[Key, dict[str, Any]], options: argparse.Namespace) -> float:
    """The best rate; the runs go into `found`. It goes on beyond an end of the rates where the best stands there."""
    row, tried = ROWS[name], FIRST
    while True:
        for rate in row.rates(tried):
            for seed in bars.bar(options.search_seeds, f"{name}, search, {rate:g}"):
                key = (options.epochs, name, rate, seed)
                if key not in found:
                    found[key] = run(key, options)
        best = best_rate(found, options.epochs, name, options.search_seeds)
        assert best is not None
        further = range(tried[0] - (best == row.rates(tried)[0]), tried[-1] + 1 + (best == row.rates(tried)[-1]))
        if further == tried or len(further) > MOST:
            return best
        tried = further


def run(key: Key, options: argparse.Namespace) -> dict[str, Any]:
    epochs, name, rate, seed = key
    data, out = options.runs / SENTENCES, options.runs / name_of(key)
    values = recipe_study.flags_with(changes(name, rate), SENTENCES, epochs, seed, data, out)
    return recipe_study.train(values, options.collect)


def kept(options: argparse.Namespace, folder: Path) -> Iterator[tuple[Key, dict[str, Any]]]:
    """The records of this study in a folder."""
    for name in options.rows:
        for rate in ROWS[name].rates(EVERY):
            for seed in (*options.search_seeds, *options.seeds):
                key = (options.epochs, name, rate, seed)
                path = folder / f"{name_of(key)}.json"
                if path.exists():
                    yield key, recipe_study.read_kept(path, changes(name, rate), seed)


def score(record: Mapping[str, Any]) -> float:
    return 100 * record["scores"]["last"][record["scores"]["metric"]]


def best_rate(found: Found, epochs: int, name: str, seeds: Sequence[int]) -> float | None:
    """The rate with the best mean over the seeds of the search; None where one of the first three rates is missing."""
    means = searched(found, epochs, name, seeds)
    return None if set(ROWS[name].rates(FIRST)) - means.keys() else max(means, key=lambda rate: means[rate])


def searched(found: Found, epochs: int, name: str, seeds: Sequence[int]) -> dict[float, float]:
    """By rate, in rising order, the mean score over the seeds of the search; of rates that have them all."""
    keys = {rate: [(epochs, name, rate, seed) for seed in seeds] for rate in ROWS[name].rates(EVERY)}
    there = {rate: group for rate, group in keys.items() if all(key in found for key in group)}
    return {rate: mean(score(found[key]) for key in group) for rate, group in there.items()}


# --- Sizes and steps ----------------------------------------------------------------------------------------------


def measure(names: Sequence[str], rounds: int = 5) -> dict[str, dict[str, Any]]:
    """For each row what is stored and trained, and the seconds of a step as a share of LoRA's.

    The rows make their steps in turns, so that other work on the machine slows all of them; the share is the median
    over the rounds.
    """
    import tempfile

    import run_glue
    from glue_tasks import get_task

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / SENTENCES
        generate_cola.write(data, train=400, dev=8, seed=0, phenomena=quickstart.PHENOMENA)
        steppers = {}
        for name in dict.fromkeys(["lora_r4", *names]):
            values = recipe_study.flags_with(
                changes(name, ROWS[name].middle), SENTENCES, 1, 0, data, Path(folder) / name
            )
            glue, method, training = run_glue.parts(run_glue.of(values))
            adapted, tokenizer = run_glue.build(glue, method, get_task("cola"))
            steppers[name] = Stepper(adapted, method.rates(), training, tokenizer, data, glue.max_length)
        times: dict[str, list[float]] = {name: [] for name in steppers}
        for _ in range(rounds + 1):  # the first is warming up
            for name, stepper in steppers.items():
                times[name].append(stepper.seconds())
    shares = {n: [own / lora for own, lora in zip(times[n], times["lora_r4"], strict=True)][1:] for n in steppers}
    return {name: {**steppers[name].sizes(), "step_of_lora": round(median(shares[name]), 3)} for name in names}


class Stepper:
    """One method in training, step by step on the same batch."""

    def __init__(self, adapted: Any, rates: Any, training: Any, tokenizer: Any, data: Path, max_length: int) -> None:
        from transformers import DataCollatorWithPadding

        from glue_data import load_task, tokenize
        from vblora import AdamW, param_groups

        rates = adapted.recipe.rates if adapted.recipe is not None else rates
        groups = param_groups(adapted.model, training.learning_rate, weight_decay=training.weight_decay, **rates)
        rows = tokenize(load_task("cola", data)["train"], tokenizer, max_length)
        self.batch = DataCollatorWithPadding(tokenizer)([rows[number] for number in range(32)])
        self.adapted, self.model, self.optimizer = adapted, adapted.model.train(), AdamW(groups)

    def seconds(self) -> float:
        start = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def sizes(self) -> dict[str, Any]:
        """Stored numbers and bytes without the head, numbers that have a rate, and the bytes of their training."""
        stored = self.adapted.adapter.stored_parameters()
        trained = sum(p.numel() for g in self.optimizer.param_groups if g["lr"] for p in g["params"] if p.requires_grad)
        trained -= self.adapted.adapter.head_parameters()
        return {"stored": stored.parameters, "bytes": stored.bytes, "trained": trained, "state_bytes": STATE * trained}


# --- Tables -------------------------------------------------------------------------------------------------------


def table(found: Found, options: argparse.Namespace, steps: Mapping[str, Any]) -> str:
    """Each method's sizes and scores, and its difference from the recipe over the same seeds."""
    epochs = options.epochs
    scores: dict[str, dict[int, float]] = {}
    rates = {name: best_rate(found, epochs, name, options.search_seeds) for name in options.rows}
    for name, rate in rates.items():
        keys = {seed: (epochs, name, rate, seed) for seed in options.seeds} if rate is not None else {}
        scores[name] = {seed: score(found[key]) for seed, key in keys.items() if key in found}
    order = sorted(options.rows, key=lambda name: -mean(scores[name].values()) if scores[name] else 1)
    reference = scores.get(REFERENCE, {})
    differences = [None if name == REFERENCE else paired.difference(scores[name], reference) for name in order]
    lines = []
    for name, columns in zip(order, paired.columns(differences), strict=True):
        values, size = list(scores[name].values()), steps.get(name, {})
        rate = rates[name]
        lines.append(
            [
                name,
                *(f"{size[key]:,}" if key in size else "" for key in ("stored", "bytes", "trained", "state_bytes")),
                f"{size['step_of_lora']:.2f}" if size else "",
                "" if rate is None else f"{rate:g}",
                tables.number(mean(values), stdev(values) if len(values) > 1 else None) if values else "not run",
                " ".join(f"{value:.1f}" for value in values),
                *columns,
                ROWS[name].note,
            ]
        )
    header = ["method", "stored numbers", "bytes", "trained", "training state", "step / LoRA's", "rate", "mean ± sd"]
    return tables.render([*header, "seeds", f"from {REFERENCE}", "p", "carried", ""], lines, "markdown")


def search_table(found: Found, options: argparse.Namespace) -> str:
    """The runs of the search: each row's rates, with the mean score of each over its seeds."""
    lines = []
    for name in options.rows:
        means = searched(found, options.epochs, name, options.search_seeds)
        if means:
            best = max(means, key=lambda rate: means[rate])
            at_an_end = "yes" if best in (min(means), max(means)) else ""
            lines.append([name, ", ".join(f"{rate:g}: {value:.1f}" for rate, value in means.items()), at_an_end])
    return tables.render(["method", "rate: score", "best at an end"], lines, "markdown")


if __name__ == "__main__":
    commands.run(main, "field_study")
