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
from transformers import HfArgumentParser, TrainingArguments, set_seed

from vblora import models
from vblora.adapter import Adapter
from vblora.io import read_json, write_json
from vblora.models import TRAINING_FILE
from vblora.switch import Adapted, apply_method
from vblora.trainer import AdapterTrainer
from vblora_experiments import causal, commands, estimate, instruction_data, records, runs
from vblora_experiments.arguments import MethodArguments, with_row
from vblora_experiments.instruction_data import FORMS, Limits, Row

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
    form: str = field(metadata={"help": f"of its rows: {', '.join(FORMS)}"})
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
        default=None, metadata={"help": "pack rows into ones of up to this many tokens, which do not see each other"}
    )
    plan: bool = field(
        default=False, metadata={"help": "print what would be stored, and estimates of memory and time, and stop"}
    )
    tflops: float = field(
        default=100.0, metadata={"help": "for --plan: 10^12 operations per second that the device reaches"}
    )
    row: str | None = field(default=None, metadata={"help": "MODEL/METHOD: take the flags of this row"})

    def limits(self) -> Limits:
        """The limits of tokens, of those that the form has.

        Raises:
            ValueError: one that it has no use for, or none left for a response.
        """
        flags = ("max_length",) if FORMS[self.form].together else ("source_max_length", "target_max_length")
        for flag in ("source_max_length", "target_max_length", "max_length"):
            value = getattr(self, flag)
            if value is not None and flag not in flags:
                raise ValueError(
                    f"--{flag} does nothing with --form {self.form}: its limits are --{', --'.join(flags)}"
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
    """

    name: str
    defaults: Mapping[str, Any]
    row: Callable[[str], Mapping[str, Any]]
    runs: Path


@dataclass(frozen=True)
class Run:
    """The arguments of one run, checked."""

    instruct: InstructArguments
    method: MethodArguments
    training: TrainingArguments


def main(arguments: list[str], folder: Folder) -> dict[str, Any]:
    """Train, and return what training.json holds; with --plan, print and return the estimates."""
    run = parse(arguments, folder)
    instruct, training = run.instruct, run.training
    if instruct.plan:
        estimates = estimate.of_run(instruct, run.method, training)
        print(estimate.describe(estimates))
        return estimates
    out = Path(str(training.output_dir))
    rows = instruction_data.load_rows(instruct.data, instruct.form, instruct.split)
    train, held_out = divide(rows, instruct, training)
    plan = runs.make_plan(instruct, run.method, training, instruction_data.fingerprint([*train, *held_out]))
    if runs.begin(out, plan) is None and not (out / TRAINING_FILE).exists():
        fit(run, train, held_out, plan)
    result = read_json(out / TRAINING_FILE) if training.process_index == 0 else {}
    if result:
        print(f"{out}: {_summary(result)}")
    return result


def parse(arguments: list[str], folder: Folder) -> Run:
    """The arguments, after the row they name, the folder's defaults and this module's."""
    arguments = with_row(arguments, folder.row)
    kinds: Any = (InstructArguments, MethodArguments, TrainingArguments)
    parser = commands.one_line_errors(HfArgumentParser(kinds, prog=folder.name))
    defaults = {**DEFAULTS, **folder.defaults}
    parser.set_defaults(**defaults)
    for action in parser._actions:  # a default does away with the need to give a flag
        action.required = action.required and action.dest not in defaults
    known = parser.parse_args(arguments)
    if known.output_dir is None:
        name = f"{models.model_name(known.model_name_or_path)}_{known.targets}_{known.method}_seed{known.seed}"
        arguments = [*arguments, "--output_dir", str(folder.runs / name.replace("/", "_"))]
    if known.plan:  # of what may run elsewhere
        arguments = [*arguments, "--use_cpu", "true"]
    if not known.held_out:  # nothing to evaluate
        if "--eval_strategy" in arguments:
            raise ValueError("--eval_strategy does nothing without --held_out, the rows to evaluate on")
        arguments = [*arguments, "--eval_strategy", "no", "--eval_on_start", "false"]
    instruct, method, training = parser.parse_args_into_dataclasses(arguments)
    check(instruct, method, training)
    training._n_gpu = min(training.n_gpu, 1)  # one process trains on one device, or on a --device_map
    return Run(instruct, method, training)


def check(instruct: InstructArguments, method: MethodArguments, training: TrainingArguments) -> None:
    """Refuse before anything is loaded what would fail, or do nothing, later."""
    if instruct.form not in FORMS:
        raise ValueError(f"unknown form {instruct.form!r}; known: {', '.join(FORMS)}")
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
    longest = limits.total if FORMS[instruct.form].together else limits.source + limits.target
    if instruct.pack_length is not None and instruct.pack_length < longest:
        raise ValueError(f"--pack_length {instruct.pack_length} is less than a row may have ({longest} tokens)")
    if instruct.pack_length is not None and training.use_cache:
        raise ValueError("--use_cache true with --pack_length: with a cache the model takes a pack for one row")
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
        causal.check_packing(adapted.model, tokenizer.eos_token_id)
    trainer = AdapterTrainer(
        adapted,
        method.rates(),
        training,
        train_dataset=dataset(encoded, instruct),
        eval_dataset=dataset(watched, instruct) if watched else None,
        data_collator=(causal.Padded if instruct.pack_length is None else causal.PaddedPacks)(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    out = Path(str(training.output_dir))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or runs.last_checkpoint(out))
    if trainer.is_world_process_zero():
        adapted.adapter.save(str(out / "last"))
        if method.method == "full":
            tokenizer.save_pretrained(out / "last")  # a whole model, for every engine
        sizes = {"train_rows": len(encoded), "rows_without_response": left_out, "held_out_rows": len(watched)}
        sizes["train_tokens"] = sum(len(one.input_ids) for one in encoded)
        write_json(out / TRAINING_FILE, _result(plan, adapted, trainer) | sizes)


def encode(rows: list[Row], instruct: InstructArguments, tokenizer: Any) -> tuple[list[causal.Encoded], int]:
    """The rows as tokens and labels, and how many are left out because nothing of the response is left.

    Raises:
        ValueError: nothing is left of any.
    """
    together = FORMS[instruct.form].together
    encoded = instruction_data.encode(rows, tokenizer, together, instruct.limits())
    kept = instruction_data.with_labels(encoded)
    if encoded and not kept:
        raise ValueError("of no row any of the response is left: raise the limits of tokens")
    return kept, len(encoded) - len(kept)


def dataset(encoded: list[causal.Encoded], instruct: InstructArguments) -> Any:
    if instruct.pack_length is None:
        return causal.EncodedRows(encoded)
    return causal.PackedRows(encoded, instruct.pack_length)


def settings_of(method: MethodArguments, instruct: InstructArguments) -> dict[str, Any]:
    """The method's settings: "all" is every linear layer but the output layer."""
    return method.settings(estimate.target_modules(instruct.targets), None)


def _result(plan: dict[str, Any], adapted: Adapted, trainer: AdapterTrainer) -> dict[str, Any]:
    adapter, seconds, state = adapted.adapter, trainer.train_seconds, trainer.state
    losses = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    return {
        "settings": plan,
        "adapter_settings": adapter.config.to_dict() if isinstance(adapter, Adapter) else None,
        **({"recipe": trainer.recipe.to_dict()} if trainer.recipe is not None else {}),
        "epochs": state.epoch or 0,
        "steps": state.global_step,
        # By step; the first is before any training.
        "held_out_losses": [{"step": step, "loss": losses[step]} for step in sorted(losses)],
        "stored_parameters": adapter.stored_parameters()._asdict(),
        "train_seconds": round(seconds, 3),
        "peak_memory_mib": records.peak_memory_mib(),
        **records.environment(),
    }


def _summary(result: dict[str, Any]) -> str:
    losses = [f"{entry['loss']:.4f} at step {entry['step']}" for entry in result["held_out_losses"]]
    text = f"held-out loss {', '.join(losses)}; " if losses else ""
    return text + f"{result['steps']} steps; {result['stored_parameters']['parameters']:,} stored parameters"
