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

Every run has the same loop, steps and head. A run that has a record is not run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import paired
import vblora
from encoders import MINILM, find_model, load_classifier
from glue_data import load_task, tokenize
from glue_tasks import TASKS, compute_metrics
from hyperparameters import TARGETS
from vblora.adapter import Adapter
from vblora.files import packed
from vblora.io import read_json, write_json
from vblora.methods import VBLoRA
from vblora.recipes import LORA_RATE, MAX_GRAD_NORM, RANK, WARMUP
from vblora.sampling import LengthGroupedSampler
from vblora_experiments import bars, commands, tables
from vblora_experiments.records import environment

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "many"
DATA_FILE = "data.json"  # the fingerprints of the tasks' rows
TOGETHER = ("cola", "mrpc", "sst2", "qnli")
VARIANTS = ("own", "selection", "refined", "added", "small", "added_int4", "small_int4", "head", "lora", "lorashare")
HEAD = ("pooler", "classifier")
MOST_ROWS = 4000  # of a task, so that none has most of the steps
BATCH, LONGEST, HEAD_RATE = 32, 128, 1e-3
JOINT_EPOCHS, EPOCHS = 2, 3
LOGITS_RATE = 0.1  # with the bank frozen the logits have all the learning to do
REFINED_RANK, REFINED_RATE = 6, 4e-3
SMALL_BANK = {"int8": 27, "int4": 53}  # vectors of 128 numbers: a packed file of less than 5 kB


class Rows(NamedTuple):
    """A task's rows as the model takes them."""

    task: str
    train: Any
    validation: Any
    collate: Callable[[list[Any]], Any]


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
    if options.no_runs:
        paths = {key: options.records / f"{key.name}.json" for key in keys}
        found = {key: read_json(path) for key, path in paths.items() if path.exists()}
    else:
        require_same_data(options.runs, options.glue_dir)
        found = {key: kept_or_run(key, options) for key in bars.bar(keys, "runs")}
    print(table(found))


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
    if options.no_runs != (options.records is not None):
        raise ValueError("--records FOLDER and --no_runs go together: the table of kept records")
    if options.glue_dir is None and not options.no_runs:
        raise ValueError("the tasks need --glue_dir, the folder with GLUE's folders")
    if "lorashare" in options.variants and not options.no_runs and importlib.util.find_spec("lorashare") is None:
        raise ValueError("the package lorashare is missing: pip install --no-deps lorashare==0.1.3, or give --variants")
    return options


# --- Runs ---------------------------------------------------------------------------------------------------------


def require_same_data(runs: Path, glue_dir: Path) -> None:
    """Refuse a folder whose runs are on other rows: what has a record there would pass for one on these."""
    now = {task: load_task(task, glue_dir / TASKS[task].folder).fingerprint for task in TOGETHER}
    before = read_json(runs / DATA_FILE) if (runs / DATA_FILE).exists() else now
    if other := [task for task in TOGETHER if before.get(task) != now[task]]:
        raise ValueError(f"{runs} holds runs on other rows of {', '.join(other)}: give another --runs")
    write_json(runs / DATA_FILE, now)


def kept_or_run(key: Key, options: argparse.Namespace) -> dict[str, Any]:
    """The record of a run, which is run unless it is there."""
    path = options.runs / f"{key.name}.json"
    record = read_json(path) if path.exists() else run(key, options)
    write_json(path, record)
    if options.collect is not None:
        write_json(options.collect / path.name, record)
    return record


def run(key: Key, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(key.seed)
    model, tokenizer = encoder(key.seed)
    rows = read(key.unseen, options.glue_dir, tokenizer, key.seed)
    found = RUN_OF[key.variant](key, options, model, rows)
    return {**key._asdict(), "rows": len(rows.train), "epochs": EPOCHS, **found, **environment()}


def encoder(seed: int) -> tuple[nn.Module, Any]:
    """MiniLM with two labels and a new head, drawn from the seed; its own weights are frozen."""
    from transformers import AutoTokenizer

    name = find_model(MINILM)
    torch.manual_seed(seed)
    model, _ = load_classifier(name, 2, HEAD, "--model")
    for name_of, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in HEAD for part in name_of.split(".")))
    return model, AutoTokenizer.from_pretrained(name)


def read(task: str, folder: Path, tokenizer: Any, seed: int) -> Rows:
    from transformers import DataCollatorWithPadding

    data = load_task(task, folder / TASKS[task].folder, max_train=MOST_ROWS, seed=seed)
    train, validation = (tokenize(data[part], tokenizer, LONGEST).to_list() for part in ("train", "validation"))
    return Rows(task, train, validation, DataCollatorWithPadding(tokenizer))


def own(key: Key, options: argparse.Namespace, model: nn.Module, rows: Rows) -> dict[str, Any]:
    chosen = vblora.recipe(model, TARGETS["all"])
    adapter = vblora.attach(model, chosen.config, seed=key.seed)
    groups = chosen.param_groups(with_head(model), lr=HEAD_RATE)
    scores = train(model, rows, groups, key.seed)
    return {"scores": scores, "bytes": packed_bytes(adapter, selection="seed")}


def selection(key: Key, options: argparse.Namespace, model: nn.Module, rows: Rows) -> dict[str, Any]:
    adapter = on_the_bank(key, options, model)
    groups = vblora.param_groups(with_head(model), lr=HEAD_RATE, lr_logits=LOGITS_RATE)
    scores = train(model, rows, groups, key.seed)
    return {"scores": scores, "bytes": packed_bytes(adapter, bank="shared", weights=8)}


def refined(key: Key, options: argparse.Namespace, model: nn.Module, rows: Rows) -> dict[str, Any]:
    adapter = on_the_bank(key, options, model)
    adapter.topk_logits.requires_grad_(False)
    change = Refinement(adapter.config.num_vectors, adapter.config.vector_length, REFINED_RANK)
    parametrize.register_parametrization(adapter, "vector_bank", change)
    head = vblora.param_groups(with_head(model, but=change), lr=HEAD_RATE)
    scores = train(model, rows, [*head, {"params": list(change.parameters()), "lr": REFINED_RATE}], key.seed)
    tensors = {name: value.detach().half() for name, value in change.named_parameters()}
    return {"scores": scores, "bytes": file_bytes(tensors)}


def added(key: Key, options: argparse.Namespace, model: nn.Module, rows: Rows, bank: str) -> dict[str, Any]:
    on_the_bank(key, options, model).topk_logits.requires_grad_(False)
    return small(key, options, model, rows, bank)


def small(key: Key, options: argparse.Namespace, model: nn.Module, rows: Rows, bank: str) -> dict[str, Any]:
    """The last score is that of the packed file, whose vectors are rounded to the bits of `bank`."""
    chosen = vblora.recipe(model, TARGETS["all"], num_vectors=SMALL_BANK[bank])
    adapter = vblora.attach(model, chosen.config, name="small_adapter", seed=key.seed)
    scores = train(model, rows, chosen.param_groups(with_head(model), lr=HEAD_RATE), key.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.vblora.safetensors"
        size = adapter.pack(path, bank=bank, selection="seed")
        adapter.load_tensors(packed.read(path).tensors)
    return {"scores": [*scores[:-1], score(model, rows)], "unrounded": scores[-1], "bytes": size}


def head(key: Key, options: argparse.Namespace, model: nn.Module, rows: Rows) -> dict[str, Any]:
    on_the_bank(key, options, model).topk_logits.requires_grad_(False)
    return {"scores": train(model, rows, vblora.param_groups(with_head(model), lr=HEAD_RATE), key.seed), "bytes": 0}


class Refinement(nn.Module):
    """bank -> bank + U V: q (h + b) numbers that move every vector of a bank (h, b) which stays as it is."""

    def __init__(self, h: int, b: int, rank: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(h, rank))
        self.v = nn.Parameter(torch.randn(rank, b) / math.sqrt(b))

    def forward(self, bank: Tensor) -> Tensor:
        return bank + self.u @ self.v


def on_the_bank(key: Key, options: argparse.Namespace, model: nn.Module) -> VBLoRA:
    """The adapter that the other tasks trained, with its bank frozen."""
    folder = options.runs / f"without_{key.unseen}_seed{key.seed}"
    if not (folder / "record.json").exists():
        write_json(folder / "record.json", train_together(key, options, folder))
    adapter = vblora.load(model, folder, trainable=True)
    assert isinstance(adapter, VBLoRA)
    adapter.vector_bank.requires_grad_(False)
    return adapter


def train_together(key: Key, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One adapter on all tasks but one, whose batches come in a mixed order; it is written into the folder."""
    model, tokenizer = encoder(key.seed)
    tasks = [read(task, options.glue_dir, tokenizer, key.seed) for task in TOGETHER if task != key.unseen]
    chosen = vblora.recipe(model, TARGETS["all"], topk=2)
    adapter = vblora.attach(model, chosen.config, seed=key.seed)
    heads = {rows.task: {name: part(encoder(key.seed)[0], name) for name in HEAD} for rows in tasks}
    groups = vblora.param_groups(model, lr=HEAD_RATE, **chosen.rates)
    moved = [p for one in heads.values() for module in one.values() for p in module.parameters()]
    optimizer, schedule = optimising(
        [*groups, {"params": moved, "lr": HEAD_RATE}], JOINT_EPOCHS * sum(map(steps_of, tasks))
    )
    for epoch in range(JOINT_EPOCHS):
        mixed = [(rows, batch) for rows in tasks for batch in batches(rows, key.seed, epoch)]
        random.Random(f"{key.seed} {epoch}").shuffle(mixed)
        model.train()
        for rows, batch in bars.bar(mixed, f"together, epoch {epoch + 1}"):
            put(model, heads[rows.task])
            step(model, batch, optimizer, schedule)
    scores = {}
    for rows in tasks:
        put(model, heads[rows.task])
        scores[rows.task] = score(model, rows)
    adapter.save(folder, form="full")
    return {"unseen": key.unseen, "seed": key.seed, "epochs": JOINT_EPOCHS, "scores": scores, **environment()}


def lora(key: Key, options: argparse.Namespace, model: nn.Module, rows: Rows) -> dict[str, Any]:
    adapted, scores = train_lora(key.unseen, key, options, model, rows)
    tensors = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    return {"scores": scores, "bytes": file_bytes(tensors)}


def lorashare(key: Key, options: argparse.Namespace, model: nn.Module, rows: Rows) -> dict[str, Any]:
    """The projection of the task's LoRA; its head is the one that was trained with that LoRA."""
    from lorashare import SHAREModel
    from peft import PeftModel
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    folders = [lora_of(task, key, options) for task in TOGETHER if task != key.unseen]
    # As many components as three adapters of rank 4 span, or more: nothing of theirs is lost.
    shared = SHAREModel.from_adapters([str(f) for f in folders], num_components=RANK * len(folders))
    own_folder = lora_of(key.unseen, key, options)
    found = shared.add_adapter(str(own_folder), name=key.unseen, variance_threshold=0.0)
    adapted = PeftModel.from_pretrained(model, str(own_folder))
    with tempfile.TemporaryDirectory() as folder:
        shared.reconstruct(key.unseen, output_dir=folder)
        projected = {name: value for name, value in load_peft_weights(folder).items() if "lora_" in name}
    weights = {**load_peft_weights(str(own_folder)), **projected}
    set_peft_model_state_dict(adapted, weights)
    loadings = {name.replace("/", "."): value for name, value in shared.all_loadings[key.unseen].items()}
    explained = {name: value for name, value in found.items() if name.endswith("variance")}
    return {"scores": [score(adapted, rows)], "bytes": file_bytes(loadings), "explained": explained}


def lora_of(task: str, key: Key, options: argparse.Namespace) -> Path:
    """The folder of the LoRA adapter of a task, trained unless it is there."""
    folder = options.runs / f"lora_{task}_seed{key.seed}"
    if not (folder / "adapter_config.json").exists():
        model, tokenizer = encoder(key.seed)
        train_lora(task, key, options, model, read(task, options.glue_dir, tokenizer, key.seed))
    return folder


def train_lora(
    task: str, key: Key, options: argparse.Namespace, model: nn.Module, rows: Rows
) -> tuple[Any, list[float]]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS["all"], modules_to_save=list(HEAD))
    adapted = get_peft_model(model, config)
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in adapted.named_parameters() if p.requires_grad and ("lora_" in name) == of_lora]}
        for of_lora in (True, False)
    ]
    groups[0]["lr"], groups[1]["lr"] = LORA_RATE, HEAD_RATE
    scores = train(adapted, rows, groups, key.seed)
    adapted.save_pretrained(options.runs / f"lora_{task}_seed{key.seed}")
    return adapted, scores


RUN_OF: Mapping[str, Callable[[Key, argparse.Namespace, nn.Module, Rows], dict[str, Any]]] = {
    "own": own,
    "selection": selection,
    "refined": refined,
    "added": partial(added, bank="int8"),
    "small": partial(small, bank="int8"),
    "added_int4": partial(added, bank="int4"),
    "small_int4": partial(small, bank="int4"),
    "head": head,
    "lora": lora,
    "lorashare": lorashare,
}


# --- The loop of all ------------------------------------------------------------------------------------------------


def train(model: nn.Module, rows: Rows, groups: list[dict[str, Any]], seed: int) -> list[float]:
    """The score after each epoch."""
    optimizer, schedule = optimising(groups, EPOCHS * steps_of(rows))
    scores = []
    for epoch in range(EPOCHS):
        model.train()
        for batch in bars.bar(batches(rows, seed, epoch), f"epoch {epoch + 1}", total=steps_of(rows)):
            step(model, batch, optimizer, schedule)
        scores.append(score(model, rows))
    return scores


def optimising(groups: list[dict[str, Any]], steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, and rates that rise over the first steps and fall to zero."""
    optimizer = vblora.AdamW(groups)
    warm = max(1, round(WARMUP * steps))
    factor = lambda at: min((at + 1) / warm, (steps - at) / max(1, steps - warm))  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def step(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    loss = model(**batch).loss
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()}")
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], MAX_GRAD_NORM)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def steps_of(rows: Rows) -> int:
    """Batches of an epoch, the last one with what is left."""
    return -(-len(rows.train) // BATCH)


def batches(rows: Rows, seed: int, epoch: int) -> Iterator[Any]:
    """An epoch's batches of like length."""
    sampler = LengthGroupedSampler([len(row["input_ids"]) for row in rows.train], BATCH, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    return (
        rows.collate([rows.train[at] for at in order[start : start + BATCH]]) for start in range(0, len(order), BATCH)
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


def with_head(model: nn.Module, but: nn.Module | None = None) -> nn.Module:
    """The model with its head trainable: an adapter freezes all beside itself."""
    for name, parameter in model.named_parameters():
        if any(part in HEAD for part in name.split(".")):
            parameter.requires_grad_(True)
    for parameter in () if but is None else but.parameters():
        parameter.requires_grad_(False)
    return model


def part(model: nn.Module, name: str) -> nn.Module:
    return next(module for path, module in model.named_modules() if path.split(".")[-1] == name)


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Give the model these modules in the place of its own of the same name."""
    for name, module in modules.items():
        path = next(path for path, _ in model.named_modules() if path.split(".")[-1] == name)
        above, _, last = path.rpartition(".")
        setattr(model.get_submodule(above), last, module.train(model.training))


def packed_bytes(adapter: Adapter, **settings: Any) -> int:
    """Bytes of the packed file, without the bank where that is in a file beside."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.vblora.safetensors"
        adapter.pack(path, **settings)
        return path.stat().st_size


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    from safetensors.torch import save

    return len(save({name: value.detach().contiguous() for name, value in tensors.items()}))


# --- The table ------------------------------------------------------------------------------------------------------


def table(found: Mapping[Key, Mapping[str, Any]]) -> str:
    """Score after the last epoch, times 100, by unseen task and variant; differences from its own bank by seed."""
    groups: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for key, record in found.items():
        groups.setdefault((key.unseen, key.variant), {})[key.seed] = record
    scores = {group: {seed: r["scores"][-1] for seed, r in records.items()} for group, records in groups.items()}
    order = sorted(groups, key=lambda group: (TOGETHER.index(group[0]), VARIANTS.index(group[1])))
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
    task: str,
    variant: str,
    records: Mapping[int, Mapping[str, Any]],
    scores: Mapping[int, float],
    columns: Sequence[str],
) -> list[str]:
    sizes = {record["bytes"] for record in records.values()}
    values = [scores[seed] for seed in sorted(scores)]
    shown = tables.number(mean(values), stdev(values) if len(values) > 1 else None)
    size = " to ".join(f"{one:,}" for one in sorted({min(sizes), max(sizes)}))
    return [task, variant, size, shown, " ".join(f"{value:.1f}" for value in values), *columns]


if __name__ == "__main__":
    commands.run(main, "many_tasks")
