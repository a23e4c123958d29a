"""Instruction tuning of a causal language model by any method: what Alpaca and MetaMathQA have in common.

instruction_tuning/finetune.py and math_instruction_tuning/finetune_math.py are this with their own rows and defaults.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from vblora import models
from vblora.switch import apply_method
from vblora.trainer import AdapterTrainer
from vblora_experiments import causal, estimate, instruction_data, publishing, runs, training_run
from vblora_experiments.arguments import MethodArguments
from vblora_experiments.command_line import Script, Settings
from vblora_experiments.instruction_data import DATA_FORMATS, Limits, Row

# What a run does unless told otherwise.
DEFAULTS: dict[str, Any] = {
    "eval_strategy": "epoch",
    "eval_on_start": True,  # the loss before the training too
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 20,
    "lr_scheduler_type": "linear",
    "prediction_loss_only": True,
    "gradient_checkpointing": False,
    "restore_callback_states_from_checkpoint": True,
    "ddp_find_unused_parameters": False,  # every adapted layer takes part in every step
    "train_sampling_strategy": "group_by_length",
}


@dataclass
class InstructArguments:
    """The data and the model."""

    model_name_or_path: str = field(metadata={"help": "a causal model: a name on the hub or a local folder"})
    data: str = field(metadata={"help": "a data set: a name on the hub, or a local .json or .jsonl file"})
    data_format: str = field(metadata={"help": f"of its rows: {', '.join(DATA_FORMATS)}"})
    split: str = field(default="train", metadata={"help": "train, train[:100000], train[10%%:20%%], ..."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on this many rows only, drawn by the seed"}
    )
    held_out: int = field(
        default=0, metadata={"help": "rows kept from the training, for their loss before and after it; 0: none"}
    )
    held_out_seed: int = field(default=0, metadata={"help": "draws the rows held out, the same for every --seed"})
    targets: str = field(default="all", metadata={"help": "layers to adapt: all, qv, or a regular expression"})
    bits: int = field(default=16, metadata={"help": "of the base model's weights: 16, 8, or 4 (NF4, double quantised)"})
    dtype: str = field(
        default="auto", metadata={"help": "of what is not quantised: auto (as it is kept), bfloat16, float32, ..."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "auto: spread one model over all GPUs, and the main memory beyond them"}
    )
    source_max_length: int | None = field(default=None, metadata={"help": "tokens of a prompt (alpaca); 512"})
    target_max_length: int | None = field(default=None, metadata={"help": "tokens of a response (alpaca); 512"})
    max_length: int | None = field(default=None, metadata={"help": "tokens of a whole row (metamath, gsm8k); 512"})
    pack_length: int | None = field(
        default=None, metadata={"help": "join rows to ones of up to this many tokens, which do not see each other"}
    )
    tflops: float = field(
        default=100.0, metadata={"help": "for --plan: 10^12 operations per second that the device reaches"}
    )

    def limits(self) -> Limits:
        """The limits of tokens, of those that the data format has.

        Raises:
            ValueError: one that it has no use for, or none left for a response.
        """
        flags = (
            ("max_length",) if DATA_FORMATS[self.data_format].together else ("source_max_length", "target_max_length")
        )
        for flag in ("source_max_length", "target_max_length", "max_length"):
            value = getattr(self, flag)
            if value is not None and flag not in flags:
                raise ValueError(
                    f"--{flag} does nothing with --data_format {self.data_format}: "
                    f"its limits are --{', --'.join(flags)}"
                )
            if value is not None and value < 2:
                raise ValueError(f"--{flag} must be at least 2, not {value}")
        one = Limits()
        return Limits(
            self.source_max_length or one.source, self.target_max_length or one.target, self.max_length or one.total
        )


@dataclass(frozen=True)
class Folder:
    """What a task folder brings.

    Attributes:
        name: of its script, for messages.
        defaults: flags that differ from DEFAULTS and from InstructArguments.
        row: the flags of a row by its name.
        runs: where its runs are kept.
        description: what --help says first.
    """

    name: str
    defaults: Mapping[str, Any]
    row: Callable[[str], Mapping[str, Any]]
    runs: Path
    description: str = ""

    def script(self, name: str = "", *kinds: type, description: str = "") -> Script:
        """The script that trains; of another name, one that has further flags, and does more after it."""
        return Script(
            name or self.name,
            (*kinds, InstructArguments, MethodArguments, TrainingArguments),
            {**DEFAULTS, **self.defaults},
            self.row,
            self.place,
            without_evaluation,
            description or self.description,
            {"form": "data_format"},
        )

    def place(self, known: Any) -> Path:
        """The output folder of a run, unless --output_dir gives it."""
        name = f"{models.model_name(known.model_name_or_path)}_{known.targets}_{known.method}_seed{known.seed}"
        return self.runs / name.replace("/", "_")

    def main(self, arguments: list[str]) -> dict[str, Any]:
        """Train, and return what training.json holds; with --plan print and return the estimates."""
        return main(arguments, self)


@dataclass(frozen=True)
class Run:
    """The arguments of one run, checked."""

    settings: Settings

    def __post_init__(self) -> None:
        check(self.instruct, self.method, self.training)
        self.training._n_gpu = min(self.training.n_gpu, 1)  # one process trains on one device, or on a --device_map

    @property
    def instruct(self) -> InstructArguments:
        return self.settings.of(InstructArguments)

    @property
    def method(self) -> MethodArguments:
        return self.settings.of(MethodArguments)

    @property
    def training(self) -> TrainingArguments:
        return self.settings.of(TrainingArguments)


def main(arguments: list[str], folder: Folder) -> dict[str, Any]:
    """Train, and return what training.json holds; with --plan, print and return the estimates."""
    run = parse(arguments, folder)
    return planned(run) if run.settings.show() else publishing.published(run.training, train(run))


def parse(arguments: list[str], folder: Folder) -> Run:
    """The arguments, after the row they name, the folder's defaults and this module's."""
    return Run(folder.script().read(arguments))


def without_evaluation(known: Any, chosen: set[str]) -> dict[str, tuple[Any, str]]:
    """Without rows to evaluate on there is no evaluation.

    Raises:
        ValueError: somebody asked for one.
    """
    if known.held_out:
        return {}
    if "eval_strategy" in chosen:
        raise ValueError("--eval_strategy does nothing without --held_out, the rows to evaluate on")
    reason = "as --held_out is 0"
    return {"eval_strategy": ("no", reason), "eval_on_start": (False, reason)}


def planned(run: Run) -> dict[str, Any]:
    """The estimates of a run, which are printed too; none where the model's configuration cannot be had."""
    try:
        model = estimate.skeleton(run.instruct.model_name_or_path)
    except ValueError as error:
        print(f"memory and time are not estimated: {error}")
        return {}
    estimates = estimate.of_run(model, run.instruct, run.method, run.training)
    print(estimate.describe(estimates))
    return estimates


def train(run: Run) -> dict[str, Any]:
    """Train, unless that is done; what training.json holds."""
    instruct, out = run.instruct, run.settings.output_dir
    rows = instruction_data.load_rows(instruct.data, instruct.data_format, instruct.split)
    rows, held_out = divide(rows, instruct, run.training)
    fingerprint = instruction_data.fingerprint([*rows, *held_out])
    plan = runs.make_plan(instruct, run.method, run.training, fingerprint)
    result = training_run.once(out, plan, run.training, lambda: fit(run, rows, held_out, plan))
    if result:
        print(f"{out}: {_summary(result)}")
    return result


def check(instruct: InstructArguments, method: MethodArguments, training: TrainingArguments) -> None:
    """Refuse before anything is loaded what would fail, or do nothing, later."""
    if instruct.data_format not in DATA_FORMATS:
        raise ValueError(f"unknown data format {instruct.data_format!r}; known: {', '.join(DATA_FORMATS)}")
    limits = instruct.limits()
    if instruct.dtype != "auto":
        models.torch_dtype(instruct.dtype)
    if instruct.bits != 16:
        if method.method == "full":
            raise ValueError(f"--bits {instruct.bits} with --method full: quantised weights cannot be trained")
        models.quantisation(instruct.bits, torch.bfloat16)
    for flag, least in (("held_out", 0), ("max_train_samples", 1), ("pack_length", 8)):
        if (value := getattr(instruct, flag)) is not None and value < least:
            raise ValueError(f"--{flag} must be at least {least}, not {value}")
    longest = limits.total if DATA_FORMATS[instruct.data_format].together else limits.source + limits.target
    if instruct.pack_length is not None and instruct.pack_length < longest:
        raise ValueError(f"--pack_length {instruct.pack_length} is less than a row may have ({longest} tokens)")
    if instruct.pack_length is not None and training.use_cache:
        raise ValueError("--use_cache true with --pack_length: with a cache the model takes joined rows for one")
    if instruct.tflops <= 0:
        raise ValueError(f"--tflops must be above 0, not {instruct.tflops:g}")
    if training.num_train_epochs <= 0 and training.max_steps <= 0:
        raise ValueError(f"--num_train_epochs must be above 0, not {training.num_train_epochs:g}")


def divide(rows: list[Row], instruct: InstructArguments, training: TrainingArguments) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those held out.

    Which are held out does not go by the run's seed, so that runs of different seeds are compared on the same ones; of
    the others --max_train_samples are drawn by it.
    """
    if instruct.held_out >= len(rows):
        raise ValueError(f"--held_out {instruct.held_out} leaves nothing of {len(rows)} rows to train on")
    held = set(random.Random(instruct.held_out_seed).sample(range(len(rows)), instruct.held_out))
    rest = [number for number in range(len(rows)) if number not in held]
    if instruct.max_train_samples is not None and instruct.max_train_samples < len(rest):
        rest = sorted(random.Random(training.seed).sample(rest, instruct.max_train_samples))
    return [rows[number] for number in rest], [rows[number] for number in sorted(held)]


def fit(run: Run, train: list[Row], held_out: list[Row], plan: dict[str, Any]) -> None:
    """Train and write last/ and training.json."""
    instruct, method, training = run.instruct, run.method, run.training
    set_seed(training.seed)
    model = models.load_model(instruct.model_name_or_path, instruct.dtype, instruct.bits, instruct.device_map)
    tokenizer = models.load_tokenizer(instruct.model_name_or_path)
    encoded, left_out = encode(train, instruct, tokenizer)
    watched, _ = encode(held_out, instruct, tokenizer)
    if training.gradient_checkpointing:
        model.config.use_cache = False
        model.enable_input_require_grads()
    adapted = apply_method(model, method.method, settings_of(method, instruct))
    if instruct.pack_length is not None:
        causal.check_joining(adapted.model, tokenizer.eos_token_id)
    trainer = AdapterTrainer(
        adapted,
        method.rates(),
        training,
        train_dataset=dataset(encoded, instruct),
        eval_dataset=dataset(watched, instruct) if watched else None,
        data_collator=(causal.Padded if instruct.pack_length is None else causal.PaddedJoined)(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    out = run.settings.output_dir
    if training_run.train(trainer, out):
        if method.method == "full":
            tokenizer.save_pretrained(out / "last")  # a whole model, for every engine
        sizes = {"train_rows": len(encoded), "rows_without_response": left_out, "held_out_rows": len(watched)}
        sizes["train_tokens"] = sum(len(one.input_ids) for one in encoded)
        training_run.write(out, plan, trainer, {**sizes, "held_out_losses": held_out_losses(trainer)})


def encode(rows: list[Row], instruct: InstructArguments, tokenizer: Any) -> tuple[list[causal.Encoded], int]:
    """The rows as tokens and labels, and how many are left out because nothing of the response is left.

    Raises:
        ValueError: nothing is left of any.
    """
    together = DATA_FORMATS[instruct.data_format].together
    encoded = instruction_data.encode(rows, tokenizer, together, instruct.limits())
    kept = instruction_data.with_labels(encoded)
    if encoded and not kept:
        raise ValueError("no row has any of its response left: raise the limits of tokens")
    return kept, len(encoded) - len(kept)


def dataset(encoded: list[causal.Encoded], instruct: InstructArguments) -> Any:
    if instruct.pack_length is None:
        return causal.EncodedRows(encoded)
    return causal.JoinedRows(encoded, instruct.pack_length)


def settings_of(method: MethodArguments, instruct: InstructArguments) -> dict[str, Any]:
    """The method's settings: "all" is every linear layer but the output layer."""
    return method.settings(estimate.target_modules(instruct.targets), None)


def held_out_losses(trainer: AdapterTrainer) -> list[dict[str, Any]]:
    """The losses on the rows held out, by step; the first is before any training."""
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    return [{"step": step, "loss": losses[step]} for step in sorted(losses)]


def _summary(result: dict[str, Any]) -> str:
    losses = [f"{entry['loss']:.4f} at step {entry['step']}" for entry in result["held_out_losses"]]
    text = f"held-out loss {', '.join(losses)}; " if losses else ""
    return text + f"{result['steps']} steps; {result['stored_parameters']['parameters']:,} stored parameters"
