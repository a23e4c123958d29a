"""Fine-tune a causal language model on a data-to-text set, by any method.

    python NLG/train.py --model_name_or_path gpt2-medium --targets all --num_train_epochs 5 --output_dir runs/e2e/try
    python NLG/train.py --model_name_or_path DIR --data_dir DIR --method lora --rank 4 --learning_rate 2e-4 ...

Takes every flag of Hugging Face's TrainingArguments besides its own. A row is the source, a separator, the reference
and the end token, as in LoRA's experiments; the loss is over the reference and the end alone, with label smoothing over
the same tokens (`--label_smoothing_factor`). Rows are grouped by length and padded to the longest of their batch. After
each epoch some validation texts are decoded and scored, quickly and not officially (`--quick_samples`).

The output folder receives last/ (the adapter after the last epoch), run.json (the settings), training.json (losses and
quick scores by epoch, stored parameters, times) and the trainer's last checkpoint. `decode.py` and `score.py` go on
from there; `run_e2e.py` does all three. A run that is finished is not run again; one that was interrupted goes on from
its last checkpoint.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vblora_experiments import commands  # it quiets what transformers imports

# isort: split
from torch import nn
from transformers import TrainingArguments, set_seed

import quick_validation
from causal_text import encode
from e2e_data import SETS, Example, Group, fingerprint, group, load_split
from e2e_rows import COMMON, row
from vblora.models import load_model, load_tokenizer, model_name, torch_dtype
from vblora.sampling import spaced
from vblora.switch import OWN_METHODS, apply_method
from vblora.trainer import AdapterTrainer
from vblora_experiments import publishing, runs, training_run
from vblora_experiments.arguments import MethodArguments
from vblora_experiments.causal import EncodedRows, Padded
from vblora_experiments.command_line import Script, Settings

DEFAULTS: dict[str, Any] = {
    **COMMON,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_strategy": "epoch",
    "prediction_loss_only": True,
    "restore_callback_states_from_checkpoint": True,
    "train_sampling_strategy": "group_by_length",
}
RUNS = Path(__file__).resolve().parents[1] / "runs" / "e2e"
# Query and value, by the names of GPT-2 and of Llama. PEFT's methods take GPT-2's fused layer whole.
QV = ["q_proj", "v_proj"]
FUSED = {"c_attn": ["q", "k", "v"]}


@dataclass
class TextArguments:
    """The data and the model."""

    model_name_or_path: str = field(metadata={"help": "a causal model: a name on the hub or a local folder"})
    dataset: str = field(default="e2e", metadata={"help": f"one of: {', '.join(SETS)}"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with the set's files; the hub unless given"})
    targets: str = field(default="all", metadata={"help": "layers to adapt: all, qv, or a regular expression"})
    split_fused: bool = field(
        default=True, metadata={"help": "adapt GPT-2's c_attn as q, k and v apart, where the method can"}
    )
    max_length: int = field(default=512, metadata={"help": "tokens of a row; longer ones are cut at the end"})
    dtype: str = field(
        default="auto", metadata={"help": "of the model's weights: auto (as they are kept), float32, bfloat16, ..."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on this many rows only, drawn by the seed"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "rows of the validation loss, evenly spaced over the split"}
    )
    quick_samples: int = field(
        default=64, metadata={"help": "validation texts decoded and scored after each epoch; 0: none"}
    )


def place(known: Any) -> Path:
    """The output folder of a run, unless --output_dir gives it."""
    model = model_name(known.model_name_or_path)
    name = f"{model}_{known.dataset}_{known.targets}_{known.method}_seed{known.seed}"
    return RUNS / name.replace("/", "_")


def check(settings: Settings) -> None:
    """Refuse before anything is loaded what would fail, or do nothing, later."""
    text, _, training = parts(settings)
    if text.max_length < 8:
        raise ValueError(f"--max_length must be at least 8, not {text.max_length}")
    for flag in ("max_train_samples", "max_eval_samples"):
        if (value := getattr(text, flag)) is not None and value < 1:
            raise ValueError(f"--{flag} must be at least 1, not {value}")
    if training.eval_strategy == "no":
        raise ValueError("--eval_strategy no leaves nothing to record: leave it at epoch")
    if text.dtype != "auto":
        torch_dtype(text.dtype)
    quick_validation.check(text.quick_samples)
    if text.quick_samples and (training.fsdp or training.deepspeed):
        raise ValueError("with FSDP or DeepSpeed no texts are decoded during training: --quick_samples 0")
    training._n_gpu = min(training.n_gpu, 1)  # one process trains on one device


KINDS = (TextArguments, MethodArguments, TrainingArguments)
SCRIPT = Script("train.py", KINDS, DEFAULTS, row, place, description=str(__doc__), check=check)


def main(arguments: list[str]) -> dict[str, Any]:
    """Train, and return what training.json holds; with --plan show what the run resolves, and return nothing."""
    return SCRIPT.start(
        arguments, lambda settings: publishing.published(settings.of(TrainingArguments), train(settings))
    )


def train(settings: Settings) -> dict[str, Any]:
    """Train, unless that is done; what training.json holds."""
    text, method, training = parts(settings)
    examples = drawn(load_split(text.dataset, "train", text.data_dir), text.max_train_samples, training.seed)
    validation = load_split(text.dataset, "validation", text.data_dir)
    watched = spaced(group(validation), text.quick_samples)
    validation = spaced(validation, text.max_eval_samples)
    plan = runs.make_plan(text, method, training, fingerprint([*examples, *validation]))
    result = training_run.once(
        settings.output_dir, plan, training, lambda: fit(settings, examples, validation, watched, plan)
    )
    if result:
        print(
            f"{settings.output_dir}: validation loss {result['validation_losses'][-1]:.4f} after "
            f"{result['epochs']:g} epochs; {result['stored_parameters']['parameters']:,} stored parameters"
        )
    return result


def parts(settings: Settings) -> tuple[TextArguments, MethodArguments, TrainingArguments]:
    return settings.of(TextArguments), settings.of(MethodArguments), settings.of(TrainingArguments)


def drawn(examples: list[Example], count: int | None, seed: int) -> list[Example]:
    """That many of the examples, drawn by the seed and left in their order; all unless a count is given."""
    if count is None or count >= len(examples):
        return examples
    return [examples[number] for number in sorted(random.Random(seed).sample(range(len(examples)), count))]


def fit(
    settings: Settings,
    examples: list[Example],
    validation: list[Example],
    watched: list[Group],
    plan: dict[str, Any],
) -> None:
    """Train and write last/ and training.json."""
    text, method, training = parts(settings)
    set_seed(training.seed)
    model, tokenizer = load_model(text.model_name_or_path, text.dtype), load_tokenizer(text.model_name_or_path)
    adapted = apply_method(model, method.method, settings_of(method, model, text))
    trainer = AdapterTrainer(
        adapted,
        method.rates(),
        training,
        train_dataset=EncodedRows(encode(examples, tokenizer, text.max_length)),
        eval_dataset=EncodedRows(encode(validation, tokenizer, text.max_length)),
        data_collator=Padded(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    if watched:
        trainer.add_callback(quick_validation.QuickValidation(adapted.model, tokenizer, watched))
    if training_run.train(trainer, settings.output_dir):
        training_run.write(settings.output_dir, plan, trainer, of_texts(trainer, len(examples)))


def settings_of(method: MethodArguments, model: nn.Module, text: TextArguments) -> dict[str, Any]:
    """The method's settings for this model's layers: GPT-2's c_attn holds query, key and value in one."""
    endings = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    fused = {name: parts for name, parts in FUSED.items() if name in endings}
    apart = bool(fused) and text.split_fused and method.method in OWN_METHODS
    more: dict[str, Any] = {"split_modules": fused} if apart else {}
    targets: Any = {"all": "all-linear", "qv": list(fused) or QV}.get(text.targets, text.targets)
    if text.targets == "qv" and apart:
        more["exclude_modules"] = [f"{name}.k" for name in fused]
    settings = method.settings(targets, None)
    return {**more, **settings}


def of_texts(trainer: AdapterTrainer, rows: int) -> dict[str, Any]:
    """What training.json has of a training on texts."""
    epochs, history = trainer.state.epoch or 0, trainer.state.log_history
    quick = [{k.removeprefix("eval_"): v for k, v in e.items() if k.startswith("eval_quick")} for e in history]
    return {
        "train_rows": rows,
        "validation_losses": [e["eval_loss"] for e in history if "eval_loss" in e],
        "quick_scores": [scores for scores in quick if scores],  # by epoch; not the official ones
        "examples_per_second": round(epochs * rows / trainer.train_seconds, 1),
    }


if __name__ == "__main__":
    commands.run(main, "train")
