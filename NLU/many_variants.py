"""The ways of many_tasks.py to adapt a model to a task that a bank has not seen.

Each trains the model of a `Run` by the same loop, and gives the scores after each epoch and the bytes that the task
adds. What they start from (the adapter of the other tasks together, LoRA adapters) is made before them by `prepare`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vblora
from hyperparameters import TARGETS
from many_loop import HEAD, Rows, Settings, encoder, rows_of, score, train, train_in_turns, with_head
from vblora.adapter import Adapter
from vblora.files import packed
from vblora.io import read_json
from vblora.methods import VBLoRA
from vblora.models import RECORD_FILE
from vblora.recipes import LORA_RATE, RANK

TOGETHER = ("cola", "mrpc", "sst2", "qnli")


class Run(NamedTuple):
    """What a variant works on.

    Attributes:
        model: the encoder with a new head; the variant adapts it.
        rows: of the unseen task.
        seed: of the run, and of the runs that it starts from.
        runs: the folder of all runs.
        settings: of the study.
    """

    model: nn.Module
    rows: Rows
    seed: int
    runs: Path
    settings: Settings

    def train(self, groups: list[dict[str, Any]], model: nn.Module | None = None) -> list[float]:
        return train(model or self.model, self.rows, groups, self.seed, self.settings)

    def together(self) -> VBLoRA:
        """The adapter that the other tasks trained, on the model, with its bank frozen."""
        adapter = vblora.load(self.model, together_in(self.runs, self.rows.task, self.seed), trainable=True)
        assert isinstance(adapter, VBLoRA)
        adapter.vector_bank.requires_grad_(False)
        return adapter


def together_in(runs: Path, unseen: str, seed: int) -> Path:
    return runs / f"without_{unseen}_seed{seed}"


def lora_in(runs: Path, task: str, seed: int) -> Path:
    return runs / f"lora_{task}_seed{seed}"


# --- The variants ---------------------------------------------------------------------------------------------------


def own(run: Run) -> dict[str, Any]:
    chosen = vblora.recipe(run.model, TARGETS["all"])
    adapter = vblora.attach(run.model, chosen.config, seed=run.seed)
    scores = run.train(chosen.param_groups(with_head(run.model), lr=run.settings.head_rate))
    return {"scores": scores, "bytes": packed_bytes(adapter, selection="seed")}


def selection(run: Run) -> dict[str, Any]:
    adapter, settings = run.together(), run.settings
    groups = vblora.param_groups(with_head(run.model), lr=settings.head_rate, lr_logits=settings.logits_rate)
    return {"scores": run.train(groups), "bytes": packed_bytes(adapter, bank="shared", weights=8)}


def refined(run: Run) -> dict[str, Any]:
    adapter, settings = run.together(), run.settings
    adapter.topk_logits.requires_grad_(False)
    head = vblora.param_groups(with_head(run.model), lr=settings.head_rate)
    change = Refinement(adapter.config.num_vectors, adapter.config.vector_length, settings.refined_rank)
    parametrize.register_parametrization(adapter, "vector_bank", change)
    scores = run.train([*head, {"params": list(change.parameters()), "lr": settings.refined_rate}])
    tensors = {name: value.detach().half() for name, value in change.named_parameters()}
    return {"scores": scores, "bytes": file_bytes(tensors)}


class Refinement(nn.Module):
    """bank -> bank + U V: q (h + b) numbers that move every vector of a bank (h, b) which stays as it is."""

    def __init__(self, h: int, b: int, rank: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(h, rank))
        self.v = nn.Parameter(torch.randn(rank, b) / math.sqrt(b))

    def forward(self, bank: Tensor) -> Tensor:
        return bank + self.u @ self.v


def added(run: Run, bank: str) -> dict[str, Any]:
    run.together().topk_logits.requires_grad_(False)
    return small(run, bank)


def small(run: Run, bank: str) -> dict[str, Any]:
    """The last score is that of the packed file, whose vectors are rounded to the bits of `bank`."""
    chosen = vblora.recipe(run.model, TARGETS["all"], num_vectors=run.settings.small_bank[bank])
    adapter = vblora.attach(run.model, chosen.config, name="small_adapter", seed=run.seed)
    scores = run.train(chosen.param_groups(with_head(run.model), lr=run.settings.head_rate))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.vblora.safetensors"
        size = adapter.pack(path, bank=bank, selection="seed")
        adapter.load_tensors(packed.read(path).tensors)
    return {"scores": [*scores[:-1], score(run.model, run.rows)], "unrounded": scores[-1], "bytes": size}


def head(run: Run) -> dict[str, Any]:
    run.together().topk_logits.requires_grad_(False)
    return {"scores": run.train(vblora.param_groups(with_head(run.model), lr=run.settings.head_rate)), "bytes": 0}


def lora(run: Run) -> dict[str, Any]:
    """LoRA of the recipe's rank, which `train_lora` trained."""
    from peft.utils import load_peft_weights

    folder = lora_in(run.runs, run.rows.task, run.seed)
    tensors = {name: value for name, value in load_peft_weights(str(folder)).items() if "lora_" in name}
    return {"scores": read_json(folder / RECORD_FILE)["scores"], "bytes": file_bytes(tensors)}


def lorashare(run: Run) -> dict[str, Any]:
    """The projection of the task's LoRA; its head is the one that was trained with that LoRA."""
    from lorashare import SHAREModel
    from peft import PeftModel
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    unseen = run.rows.task
    folders = [lora_in(run.runs, task, run.seed) for task in TOGETHER if task != unseen]
    # As many components as three adapters of rank 4 span, or more: nothing of theirs is lost.
    shared = SHAREModel.from_adapters([str(folder) for folder in folders], num_components=RANK * len(folders))
    of_unseen = str(lora_in(run.runs, unseen, run.seed))
    found = shared.add_adapter(of_unseen, name=unseen, variance_threshold=0.0)
    adapted = PeftModel.from_pretrained(run.model, of_unseen)
    with tempfile.TemporaryDirectory() as folder:
        shared.reconstruct(unseen, output_dir=folder)
        projected = {name: value for name, value in load_peft_weights(folder).items() if "lora_" in name}
    set_peft_model_state_dict(adapted, {**load_peft_weights(of_unseen), **projected})
    loadings = {name.replace("/", "."): value for name, value in shared.all_loadings[unseen].items()}
    explained = {name: value for name, value in found.items() if name.endswith("variance")}
    return {"scores": [score(adapted, run.rows)], "bytes": file_bytes(loadings), "explained": explained}


VARIANTS: Mapping[str, Callable[[Run], dict[str, Any]]] = {
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
ON_THE_BANK = ("selection", "refined", "added", "added_int4", "head")


# --- What they start from -------------------------------------------------------------------------------------------


def train_together(unseen: str, seed: int, runs: Path, glue_dir: Path, settings: Settings) -> dict[str, Any]:
    """One adapter on all tasks but one, by the recipe with k 2; it is written into its folder. The score of each."""
    model, tokenizer = encoder(seed)
    tasks = [rows_of(task, glue_dir, tokenizer, seed, settings) for task in TOGETHER if task != unseen]
    chosen = vblora.recipe(model, TARGETS["all"], topk=2)
    adapter = vblora.attach(model, chosen.config, seed=seed)
    groups = vblora.param_groups(model, lr=settings.head_rate, **chosen.rates)
    scores = train_in_turns(model, tasks, groups, seed, settings)
    adapter.save(together_in(runs, unseen, seed), form="full")
    return {"scores": scores}


def train_lora(run: Run) -> dict[str, Any]:
    """LoRA of the recipe's rank on the rows' task; it is written into its folder. The score after each epoch."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS["all"], modules_to_save=list(HEAD))
    adapted = get_peft_model(run.model, config)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained.items() if "lora_" in name], "lr": LORA_RATE},
        {"params": [p for name, p in trained.items() if "lora_" not in name], "lr": run.settings.head_rate},
    ]
    scores = run.train(groups, adapted)
    adapted.save_pretrained(str(lora_in(run.runs, run.rows.task, run.seed)))
    return {"scores": scores}


# --- Bytes ----------------------------------------------------------------------------------------------------------


def packed_bytes(adapter: Adapter, **settings: Any) -> int:
    """Bytes of the packed file, without the bank where that is in a file beside."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.vblora.safetensors"
        adapter.pack(path, **settings)
        return path.stat().st_size


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    from safetensors.torch import save

    return len(save({name: value.detach().contiguous() for name, value in tensors.items()}))
