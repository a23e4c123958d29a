"""The experiments on GLUE, each a list of trials: a row of hyperparameters.py, and what differs from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import paper
from hyperparameters import row as flags_of
from vblora_experiments import runs

MNLI_STARTED = ("mrpc", "rte", "stsb")  # the tasks that LoRA and LoRA-XS start from an MNLI-tuned adapter


@dataclass(frozen=True)
class Trial(runs.Trial):
    """One cell of a table: a row MODEL/TASK/METHOD, under some changes, for one seed.

    Attributes:
        from_mnli: start from the adapter that was trained on MNLI.
        bank_of: the task whose adapter's bank is used, frozen; "" for a bank of its own.
    """

    from_mnli: bool = False
    bank_of: str = ""

    @property
    def task(self) -> str:
        return self.row.split("/")[1]

    def row_flags(self) -> dict[str, Any]:
        return flags_of(self.row)

    def marks(self) -> list[str]:
        return [self.variant, "from_mnli" if self.from_mnli else ""]

    @property
    def starts(self) -> set[str]:
        begins = {"start_from": self.from_mnli, "bank_from": bool(self.bank_of)}
        return {name for name, does in begins.items() if does}

    def start(self) -> Trial | None:
        """The run that must be there before this one."""
        if self.from_mnli:  # one for all seeds, as LoRA had one checkpoint
            form = {"form": "full"} if self.method.startswith("vblora") else {}
            return Trial(f"{self.model}/mnli/{self.method}", changes=form, extra=self.extra)
        if self.bank_of:
            return Trial(f"{self.model}/{self.bank_of}/{self.method}", seed=self.seed, extra=self.extra)
        return None


Changes = dict[str, Any]


@dataclass(frozen=True)
class Ablation:
    """One method on one task, under changes of its settings.

    `variants` and `paper` go by the variant's name; `variants_of` replaces the changes for a model that cannot have
    the paper's (sub-vectors longer than it is wide).
    """

    title: str
    variants: Mapping[str, Changes]
    paper: Mapping[str, float] = field(default_factory=dict)
    variants_of: Mapping[str, Mapping[str, Changes]] = field(default_factory=dict)
    method: str = "vblora_qv"
    task: str = "cola"
    model: str = "roberta_large"

    def of(self, model: str) -> Mapping[str, Changes]:
        return self.variants_of.get(model, self.variants)


def _rule(rule: str, topk: int, **more: Any) -> Changes:
    return {"method": "vblora_selection", "rule": rule, "topk": topk, **more}


GUMBEL_TAU = 0.3333333333333333  # the paper's 1/3

ABLATIONS: dict[str, Ablation] = {
    "table5": Ablation(
        "Table 5: how the vectors of the bank are selected",
        {
            "select_all": {"topk": 90},  # k = h
            "top1": {"topk": 1},
            "top2": {"topk": 2},
            "top3": {"topk": 3},
            "top6": {"topk": 6},
            "noisy_top1": _rule("noisy_topk", 1),
            "noisy_top2": _rule("noisy_topk", 2),
            # In training the Gumbel rules mix all vectors; k counts at inference.
            "gumbel_top1": _rule("gumbel", 1, tau=GUMBEL_TAU),
            "gumbel_top2": _rule("gumbel", 2, tau=GUMBEL_TAU),
            "gumbel_st_top1": _rule("gumbel_st", 1, tau=GUMBEL_TAU),
            "gumbel_st_top2": _rule("gumbel_st", 2, tau=GUMBEL_TAU),
        },
        paper.TABLE_5,
    ),
    "table6": Ablation(
        "Table 6: sub-vector length against bank size, at the same number of bank parameters",
        {
            f"b{b}_h{h}": {"vector_length": b, "num_vectors": h}
            for b, h in ((128, 240), (256, 120), (512, 60), (1024, 30))
        },
        paper.TABLE_6,
        {
            "roberta_base": {
                f"b{b}_h{h}": {"vector_length": b, "num_vectors": h} for b, h in ((128, 240), (256, 120), (768, 40))
            },
            "minilm": {
                f"b{b}_h{h}": {"vector_length": b, "num_vectors": h}
                for b, h in ((64, 180), (128, 90), (192, 60), (384, 30))
            },
        },
    ),
    "init_std": Ablation(
        "Standard deviation of the initial logits (0.01: the authors' GLUE code; 0.1: PEFT's default)",
        {f"std{std}": {"init_logits_std": std} for std in (0.001, 0.01, 0.1, 1.0)},
    ),
    "bank_size": Ablation("Bank size", {f"h{h}": {"num_vectors": h} for h in (30, 90, 270)}),
    "shared_bank": Ablation(
        "One bank for several tasks: MRPC and others on the frozen bank that was trained on CoLA",
        {
            "own_bank": {},
            "bank_of_cola": {"bank_of": "cola"},
            # With the bank frozen the logits have all the learning to do.
            "bank_of_cola_logits0.1": {"bank_of": "cola", "learning_rate_logits": 0.1},
            "bank_of_cola_logits1": {"bank_of": "cola", "learning_rate_logits": 1.0},
        },
        method="vblora_all",
        task="mrpc",
    ),
    "learning_rates": Ablation(
        "Learning rates of the bank and of the logits (the paper's: 1e-3 and 1e-2)",
        {
            f"bank{bank}_logits{logits}": {"learning_rate_vector_bank": bank, "learning_rate_logits": logits}
            for bank in (1e-3, 2e-3, 4e-3, 8e-3)
            for logits in (1e-2, 3e-2)
        },
    ),
}
TABLE_1 = "table1"
EXPERIMENTS = (TABLE_1, *ABLATIONS)
TABLE_1_MODELS = ("roberta_base", "roberta_large")


def table1(
    models: Sequence[str], methods: Sequence[str], tasks: Sequence[str], seeds: Sequence[int], mnli_start: bool = False
) -> list[Trial]:
    """The trials of Table 1, seed by seed, so that a table of fewer seeds is there first."""
    return [
        Trial(f"{model}/{task}/{method}", seed=seed, from_mnli=mnli_start and task in MNLI_STARTED)
        for seed in seeds
        for model in models
        for task in tasks
        for method in methods
    ]


def ablation(
    name: str, models: Sequence[str], tasks: Sequence[str], variants: Sequence[str] | None, seeds: Sequence[int]
) -> list[Trial]:
    """The trials of an ablation; a variant that is the row as it stands shares Table 1's run.

    Raises:
        ValueError: an unknown variant.
    """
    study = ABLATIONS[name]
    trials = []
    for model in models:
        known = study.of(model)
        for variant in variants or known:
            if variant not in known:
                raise ValueError(f"{name} has no variant {variant!r} for {model}; known: {', '.join(known)}")
        trials += [
            trial_of(f"{model}/{task}/{study.method}", variant, known[variant], seed)
            for seed in seeds
            for task in tasks
            for variant in variants or known
        ]
    return trials


def trial_of(row: str, variant: str, changes: Changes, seed: int) -> Trial:
    """The trial of a row under these changes, without those that change nothing."""
    flags, changes = flags_of(row), dict(changes)
    if bank_of := changes.pop("bank_of", ""):
        return Trial(row, variant, {flag: str(v) for flag, v in changes.items()}, seed, bank_of=bank_of)
    real = {flag: str(value) for flag, value in changes.items() if flags.get(flag) != value}
    return Trial(row, variant if real else "", real, seed)
