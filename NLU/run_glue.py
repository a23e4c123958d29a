"""Fine-tune an encoder on one GLUE task, by any method, and write a record of the run.

    python NLU/run_glue.py --model_name_or_path roberta-base --task cola --targets all --output_dir runs/cola
    python NLU/run_glue.py --row roberta_base/cola/vblora_all     # the same with Table 7's values
    python NLU/run_glue.py --row minilm/cola/lora_qv --data_dir DIR --num_train_epochs 3

Takes every flag of Hugging Face's TrainingArguments besides its own. Flags after --row override the row. A run that
has a record is not run again; one that was interrupted goes on from its last checkpoint.

The output folder receives last/ and best/ (the adapter and the head after the last and the best epoch), run.json
(the settings), record.json (the result), selections.safetensors (what VB-LoRA selected, epoch by epoch) and the
trainer's last checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vblora_experiments import commands  # it quiets what transformers imports

# isort: split
import numpy as np
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    TrainingArguments,
    set_seed,
)

from encoders import find_model, load_classifier, require_positions
from glue_data import TaskData, load_task, tokenize
from glue_tasks import Task, compute_metrics, get_task
from hyperparameters import TARGETS, row
from vblora.adapter import Adapter
from vblora.files.reading import read_bank
from vblora.hub import from_hub
from vblora.methods import SelectionVBLoRA, VBLoRA
from vblora.methods.given_bank import use_bank
from vblora.models import model_name
from vblora.shapes import FLOAT32_BYTES, Count
from vblora.switch import Adapted, AnyAdapter, apply_method
from vblora.trainer import AdapterTrainer, KeepBest
from vblora_experiments import publishing, records, runs
from vblora_experiments.arguments import MethodArguments
from vblora_experiments.command_line import Script, Settings, StartArguments
from vblora_experiments.selection_log import SelectionLog

# What a run does unless told otherwise: one evaluation and one checkpoint per epoch.
DEFAULTS: dict[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_strategy": "epoch",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "linear",
    "restore_callback_states_from_checkpoint": True,
    "train_sampling_strategy": "group_by_length",
}
RUNS = Path(__file__).resolve().parents[1] / "runs" / "glue"


def place(known: Any) -> Path:
    """The output folder of a run, unless --output_dir gives it."""
    name = f"{model_name(known.model_name_or_path)}_{known.task}_{known.targets}_{known.method}_seed{known.seed}"
    return RUNS / name.replace("/", "_")


@dataclass
class GlueArguments:
    """The task, its data and the model."""

    task: str = field(metadata={"help": "cola, sst2, mrpc, qnli, rte, stsb or mnli"})
    model_name_or_path: str = field(metadata={"help": "an encoder: a name on the hub or a local folder"})
    data_dir: str | None = field(
        default=None, metadata={"help": "folder with the task's files (.tsv, .csv, .jsonl); the hub unless given"}
    )
    targets: str = field(
        default="all", metadata={"help": f"layers to adapt: {' or '.join(TARGETS)}, or a regular expression"}
    )
    start_from: str | None = field(
        default=None, metadata={"help": "start from the adapter in this folder, such as an MNLI run's best/"}
    )
    bank_from: str | None = field(
        default=None,
        metadata={"help": "take the vector bank of the VB-LoRA adapter in this folder and train without changing it"},
    )
    form: str = field(
        default="topk", metadata={"help": "of VB-LoRA's files: topk, or full (all logits) for --start_from"}
    )
    max_length: int = field(default=128, metadata={"help": "tokens per example; longer ones are cut"})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "pad every row to --max_length, as the authors do, not to its batch's longest"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "train on this many rows only"})
    head: str = field(
        default="classifier", metadata={"help": "modules trained in full beside the adapter, with commas between"}
    )


def check(settings: Settings) -> None:
    """Refuse before anything is loaded what would fail, or do nothing, after the training."""
    glue, method, training = parts(settings)
    # One process trains on one device. On several, start the script with torchrun or accelerate launch; the
    # trainer would otherwise use DataParallel, whose copies of the model share one adapter.
    training._n_gpu = min(training.n_gpu, 1)
    if training.eval_strategy == "no":
        raise ValueError("--eval_strategy no leaves nothing to record: the scores come from the evaluations")
    if training.num_train_epochs <= 0 and training.max_steps <= 0:
        raise ValueError(f"--num_train_epochs must be above 0, not {training.num_train_epochs:g}")
    if glue.max_length < 3:
        raise ValueError(f"--max_length must be at least 3, not {glue.max_length}")
    if method.method == "full":
        for flag in ("targets", "head"):
            if getattr(glue, flag) != GlueArguments.__dataclass_fields__[flag].default:
                raise ValueError(f"--{flag} does nothing with --method full: leave it out")
    if glue.start_from is not None and not Path(glue.start_from).is_dir():
        raise ValueError(f"--start_from {glue.start_from}: no such folder")
    if glue.bank_from is not None:
        if method.method != "vblora":
            raise ValueError(f"--bank_from does nothing with --method {method.method}: leave it out")
        if method.topk == 1 or (method.recipe and method.topk is None):
            raise ValueError(
                "--bank_from leaves nothing of the adapter to train where one vector makes a sub-vector"
                f"{', as by --recipe' if method.topk is None else ''}: the selection never moves; give --topk 2"
            )
        read_bank(glue.bank_from)
    if glue.form != "topk" and not method.method.startswith("vblora"):
        raise ValueError(f"--form does nothing with --method {method.method}: leave it out")


KINDS = (GlueArguments, MethodArguments, TrainingArguments)
SCRIPT = Script("run_glue.py", KINDS, DEFAULTS, row, place, description=str(__doc__), check=check)
read, of = SCRIPT.read, SCRIPT.of


def main(arguments: list[str]) -> dict[str, Any]:
    """Run, and return the record; with --plan show what the run resolves, and return nothing."""
    return run(read(arguments))


def parse(arguments: list[str]) -> tuple[GlueArguments, MethodArguments, TrainingArguments]:
    """The settings of a command line, one object for each kind of flags."""
    return parts(read(arguments))


def parts(settings: Settings) -> tuple[GlueArguments, MethodArguments, TrainingArguments]:
    return settings.of(GlueArguments), settings.of(MethodArguments), settings.of(TrainingArguments)


def run(settings: Settings) -> dict[str, Any]:
    """One run, unless it is finished already; its record."""
    if settings.show():
        return {}
    glue, method, training = parts(settings)
    task, out = get_task(glue.task), settings.output_dir
    data = load_task(task.name, glue.data_dir, max_train=glue.max_train_samples, seed=training.seed)
    plan = make_plan(glue, method, training, data)
    publishing.check(training)
    if done := runs.begin(out, plan):
        print(f"{out} is finished already: {_summary(done)}")
        return publishing.published(training, done)

    set_seed(training.seed)
    adapted, tokenizer = build(glue, method, task)
    if glue.start_from is not None:
        adapted.adapter.start_from(glue.start_from)
    trainer = make_trainer(glue, method, training, data, adapted, tokenizer, out)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or runs.last_checkpoint(out))
    if not trainer.is_world_process_zero():
        return {}
    adapted.adapter.save(str(out / "last"), form=glue.form)
    record = make_record(plan, task, data, trainer, out)
    record |= {"row": settings.of(StartArguments).row, "overrides": settings.overrides}
    runs.finish(out, record)
    print(_summary(record))
    return publishing.published(training, record)


def make_plan(
    glue: GlueArguments, method: MethodArguments, training: TrainingArguments, data: TaskData
) -> dict[str, Any]:
    """All that decides the result of a run."""
    plan = runs.make_plan(glue, method, training, data.fingerprint, find_model(glue.model_name_or_path))
    if "target_modules" in plan.get("method_file", {}):
        plan["targets"] = "as in the file"
    return plan


def rates(glue: GlueArguments, method: MethodArguments) -> dict[str, float | None]:
    """The learning rates beside the head's; a frozen bank has none."""
    return {name: rate for name, rate in method.rates().items() if name != "lr_vector_bank" or glue.bank_from is None}


def build(glue: GlueArguments, method: MethodArguments, task: Task) -> tuple[Adapted, Any]:
    """The model with its adapter, and the tokenizer."""
    name = find_model(glue.model_name_or_path)
    flag = "--model_name_or_path DIR"
    tokenizer = from_hub(lambda: AutoTokenizer.from_pretrained(name), name, flag)
    model, new = load_classifier(name, task.num_labels, glue.head.split(","), flag)
    settings = method.settings(TARGETS.get(glue.targets, glue.targets), [*glue.head.split(","), *new])
    adapted = apply_method(model, method.method, settings)
    if glue.bank_from is not None:
        assert isinstance(adapted.adapter, VBLoRA)
        use_bank(adapted.adapter, glue.bank_from)
    return adapted, tokenizer


def make_trainer(
    glue: GlueArguments,
    method: MethodArguments,
    training: TrainingArguments,
    data: TaskData,
    adapted: Adapted,
    tokenizer: Any,
    out: Path,
) -> AdapterTrainer:
    """The trainer, with the rows tokenized once and padded batch by batch."""

    def scores(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        guesses = np.squeeze(logits, -1) if data.task.is_regression else np.argmax(logits, axis=-1)
        return compute_metrics(data.task.name, guesses, np.asarray(prediction.label_ids))

    train, validation = (tokenize(data[part], tokenizer, glue.max_length) for part in ("train", "validation"))
    longest = max(len(ids) for part in (train, validation) for ids in part["input_ids"])
    require_positions(adapted.model, glue.max_length if glue.pad_to_max_length else longest)
    trainer = AdapterTrainer(
        adapted,
        rates(glue, method),
        training,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=(
            DataCollatorWithPadding(tokenizer, padding="max_length", max_length=glue.max_length)
            if glue.pad_to_max_length
            else DataCollatorWithPadding(tokenizer)
        ),
        processing_class=tokenizer,
        compute_metrics=scores,
    )
    trainer.add_callback(KeepBest(adapted.adapter, data.task.metric, out / "best", glue.form))
    if isinstance(adapted.adapter, (VBLoRA, SelectionVBLoRA)):
        trainer.add_callback(SelectionLog(adapted.adapter, out))
    return trainer


def make_record(plan: dict[str, Any], task: Task, data: TaskData, trainer: AdapterTrainer, out: Path) -> dict[str, Any]:
    """Everything there is to know of the run."""
    adapter, steps, seconds = trainer.adapter, trainer.state.global_step, trainer.train_seconds
    examples = (trainer.state.epoch or 0) * len(data["train"])
    return {
        "experiment": "glue",
        "task": task.name,
        "model": plan["model_name_or_path"],
        "method": plan["method"],
        "targets": plan["targets"],
        "seed": plan.get("seed", trainer.args.seed),
        "settings": plan,
        "adapter_settings": adapter.config.to_dict() if isinstance(adapter, Adapter) else None,
        **({"recipe": trainer.recipe.to_dict()} if trainer.recipe is not None else {}),
        "data": {
            "fingerprint": data.fingerprint,
            "train_rows": len(data["train"]),
            "validation_rows": len(data["validation"]),
        },
        "scores": records.scores(trainer.state.log_history, task.metric),
        "stored_parameters": _stored(plan, adapter)._asdict(),
        "head_parameters": adapter.head_parameters(),
        "bytes_on_disk": sum(p.stat().st_size for p in (out / "last").glob("*.safetensors")),
        "steps": steps,
        "train_seconds": round(seconds, 3),
        "examples_per_second": round(examples / seconds, 1),
        "peak_memory_mib": records.peak_memory_mib(),
        **records.environment(),
    }


def _stored(plan: dict[str, Any], adapter: AnyAdapter) -> Count:
    """What is stored for this task; another task's bank is there already."""
    count = adapter.stored_parameters()
    if "bank_from" not in plan:
        return count
    assert isinstance(adapter, VBLoRA)
    numbers = adapter.vector_bank.numel()
    values = {name: value - numbers for name, value in count._asdict().items()}
    return Count(**values | {"bytes": count.bytes - numbers * FLOAT32_BYTES})


def _summary(record: dict[str, Any]) -> str:
    scores = record["scores"]
    metric, last, best = scores["metric"], scores["last"], scores["best"]
    return (
        f"{record['task']} {record['method']}: {metric} {last[metric]:.4f} at the last epoch, "
        f"{best[metric]:.4f} at the best (epoch {best['epoch']:g}); "
        f"{record['stored_parameters']['parameters']:,} stored parameters, {record['bytes_on_disk']:,} bytes on disk"
    )


if __name__ == "__main__":
    commands.run(main, "run_glue")
