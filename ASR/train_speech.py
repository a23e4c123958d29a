"""Fine-tune a Whisper on one language's recordings and transcripts, by any method.

    python ASR/train_speech.py --row tiny_en/recipe --language it --data_dir DIR --model_name_or_path DIR
    python ASR/train_speech.py --model_name_or_path openai/whisper-large-v2 --data_dir DIR --language it \
        --method lora --rank 8 --targets both --learning_rate 1e-3 --bf16 true --output_dir runs/asr/try

Takes every flag of Hugging Face's TrainingArguments besides its own. Flags after --row override the row. --data_dir
holds train.tsv and dev.tsv of FLEURS, of Common Voice, or with path and text (speech_data.py says more). The loss is
over the text and its end alone. Rows are grouped by the length of their texts.

Features are computed once and kept in --cache_dir; so are the encoder's outputs where nothing of the encoder is trained
(--targets decoder or cross), which leaves the decoder alone to be computed in every step.

The output folder receives last/ (the adapter), run.json (the settings), training.json (losses, stored parameters,
times) and the trainer's last checkpoint; `transcribe.py` goes on from there, and `run_asr.py` does both and scores. A
run that is finished is not run again; one that was interrupted goes on from its last checkpoint. --method zero_shot
trains nothing: the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vblora_experiments import commands  # it quiets what transformers imports

# isort: split
from torch import nn
from transformers import TrainingArguments, set_seed

import speech_data
from asr_rows import OF_TRAINING, training_row
from features import Features, encoded_of, features_of, spec_augment
from speech_data import LONG, Set, load_split, refuse_same
from speech_rows import OWN_FRAMES, SpeechBatches, SpeechRows, text_tokens
from vblora.io import write_json
from vblora.models import TRAINING_FILE, model_name, torch_dtype
from vblora.switch import apply_method
from vblora.trainer import AdapterTrainer
from vblora_experiments import publishing, records, runs, training_run
from vblora_experiments.arguments import MethodArguments, given
from vblora_experiments.command_line import Script, Settings
from vblora_experiments.whisper_counts import TARGETS
from whisper_models import (
    WINDOW,
    Prompt,
    check_targets,
    load_tokenizer,
    load_whisper,
    model_print,
    prompt_of,
    target_modules,
    trains_encoder,
)

DEFAULTS: dict[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_strategy": "epoch",
    "prediction_loss_only": True,
    "remove_unused_columns": False,
    "restore_callback_states_from_checkpoint": True,
    "train_sampling_strategy": "group_by_length",
}
RUNS = Path(__file__).resolve().parents[1] / "runs" / "asr"
ZERO_SHOT = "zero_shot"


@dataclass
class SpeechArguments:
    """The data and the model."""

    model_name_or_path: str = field(metadata={"help": "a Whisper: a name on the hub or a local folder"})
    data_dir: str = field(metadata={"help": "folder with train.tsv, dev.tsv and test.tsv of one language"})
    language: str = field(metadata={"help": "of the recordings, such as it"})
    language_token: str | None = field(
        default=None, metadata={"help": "whose token is used, for a language that Whisper has none of"}
    )
    targets: str = field(
        default="decoder", metadata={"help": f"layers to adapt: {', '.join(TARGETS)}, or a regular expression"}
    )
    window: int = field(default=WINDOW, metadata={"help": "seconds that the model hears at once; less is faster"})
    long_clips: str = field(
        default="refuse",
        metadata={
            "help": "recordings longer than the window, and transcripts than the decoder reads: refuse, or leave_out "
            "(told and counted)"
        },
    )
    spec_augment: bool = field(default=False, metadata={"help": "mask bands of time and frequency in training"})
    dtype: str = field(default="float32", metadata={"help": "of the model's weights"})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on this many recordings only, evenly spaced over the table"}
    )
    cache_dir: str = field(default=str(RUNS / "cache"), metadata={"help": "where features are kept"})
    cache_encoder: bool = field(
        default=True, metadata={"help": "keep the encoder's outputs where nothing of it is trained"}
    )


def place(known: Any) -> Path:
    """The output folder of a run, unless --output_dir gives it."""
    model = model_name(known.model_name_or_path)
    name = f"{model}_{known.language}_{known.targets}_{known.method}_seed{known.seed}"
    return RUNS / name.replace("/", "_")


def check(settings: Settings) -> None:
    """Refuse what cannot be, before anything is read.

    Raises:
        ValueError: naming the flag.
    """
    speech, method, training = parts(settings)
    if training.eval_strategy == "no":
        raise ValueError("--eval_strategy no leaves nothing to record: leave it at epoch")
    training._n_gpu = min(training.n_gpu, 1)  # one process trains on one device
    if speech.long_clips not in LONG:
        raise ValueError(f"--long_clips must be one of {', '.join(LONG)}, not {speech.long_clips!r}")
    commands.check_least(speech, max_train_samples=1)
    torch_dtype(speech.dtype)
    refuse_same(speech.data_dir, settings.output_dir)
    if method.method == "full" and speech.targets != "both":
        raise ValueError(f"--method full trains the whole model: --targets both, not {speech.targets}")
    if method.method == ZERO_SHOT:
        check_zero_shot(settings)


def check_zero_shot(settings: Settings) -> None:
    """Refuse what somebody has chosen and what would do nothing: the run would be named after it.

    Raises:
        ValueError: naming the flag.
    """
    speech, method, _ = parts(settings)
    if len(given(method)) > 1:
        raise ValueError(f"--method {ZERO_SHOT} trains nothing and has no settings: leave them out")
    of_training = {f.name for f in fields(TrainingArguments)} - {"bf16"}  # a row may have it, and a processor not
    given_flags = settings.overrides.keys() - ({"spec_augment"} if not speech.spec_augment else set())
    if useless := sorted((of_training | set(OF_TRAINING)) & given_flags):
        raise ValueError(f"--{useless[0]} does nothing with --method {ZERO_SHOT}, which trains nothing: leave it out")


KINDS = (SpeechArguments, MethodArguments, TrainingArguments)
SCRIPT = Script("train_speech.py", KINDS, DEFAULTS, training_row, place, description=str(__doc__), check=check)


def main(arguments: list[str]) -> dict[str, Any]:
    """Train, and return what training.json holds; with --plan show what the run resolves, and return nothing."""
    return SCRIPT.start(
        arguments, lambda settings: publishing.published(settings.of(TrainingArguments), train(settings))
    )


def train(settings: Settings, first: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train, unless that is done; what training.json holds. `first` is called before there is anything to train."""
    speech, method, training = parts(settings)
    out = settings.output_dir
    rows, dev = (read_split(speech, split) for split in ("train", "dev"))
    rows = spaced_set(rows, speech.max_train_samples)
    sounds = [speech_data.sound_prints(part.clips) for part in (rows, dev)]
    data = speech_data.fingerprint([*rows.clips, *dev.clips], [*sounds[0], *sounds[1]])
    plan = runs.make_plan(speech, method, training, data)

    def begin() -> None:
        first()
        fit(settings, (rows, dev), sounds, plan)

    result = training_run.once(out, plan, training, begin)
    if result and result["validation_losses"]:
        print(
            f"{out}: validation loss {result['validation_losses'][-1]:.4f} after {result['steps']} steps; "
            f"{result['stored_parameters']['parameters']:,} stored parameters"
        )
    return result


def parts(settings: Settings) -> tuple[SpeechArguments, MethodArguments, TrainingArguments]:
    return settings.of(SpeechArguments), settings.of(MethodArguments), settings.of(TrainingArguments)


def read_split(speech: SpeechArguments, split: str) -> Set:
    """The clips of a split; what is noteworthy of them is said."""
    found = load_split(speech.data_dir, split, speech.window, speech.long_clips)
    for note in found.notes:
        print(f"{split}: {note}", flush=True)
    return found


def spaced_set(found: Set, count: int | None) -> Set:
    """That many of the clips, evenly spaced; all without a count."""
    if count is None or count >= len(found.clips):
        return found
    kept = [number * len(found.clips) // count for number in range(count)]
    return found._replace(clips=[found.clips[n] for n in kept], seconds=[found.seconds[n] for n in kept])


def fit(settings: Settings, sets: tuple[Set, Set], sounds: list[list[str]], plan: dict[str, Any]) -> None:
    """Train and write last/ and training.json."""
    speech, method, training = parts(settings)
    set_seed(training.seed)
    model = load_whisper(speech.model_name_or_path, speech.dtype, speech.window)
    tokenizer = load_tokenizer(speech.model_name_or_path)
    prompt = prompt_of(model, tokenizer, speech.language, speech.language_token)
    out = settings.output_dir
    if method.method == ZERO_SHOT:
        write_json(out / TRAINING_FILE, untrained(plan, prompt))
        return
    check_targets(model, speech.targets)
    adapted = apply_method(model, method.method, settings_of(method, speech))
    rows = rows_of(model, tokenizer, prompt, speech, sets, sounds)
    trainer = SpeechTrainer(
        adapted,
        method.rates(),
        training,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        data_collator=SpeechBatches(prompt, tokenizer.pad_token_id, model.dtype),
        processing_class=tokenizer,
    )
    trainer.spec_augment = speech.spec_augment
    if training_run.train(trainer, out):
        training_run.write(out, plan, trainer, of_speech(prompt, trainer, sets[0], rows[0]))


class SpeechTrainer(AdapterTrainer):
    """Masks the features of training batches, where that is asked for."""

    spec_augment = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *others: Any, **more: Any) -> Any:
        inputs = dict(inputs)
        own_frames = inputs.pop(OWN_FRAMES, None)
        if self.spec_augment and model.training:
            inputs["input_features"] = spec_augment(inputs["input_features"], own_frames.tolist())
        return super().compute_loss(model, inputs, *others, **more)


def rows_of(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    speech: SpeechArguments,
    sets: tuple[Set, Set],
    sounds: list[list[str]],
) -> list[SpeechRows]:
    """The rows for training and for the validation loss: of features, or of a fixed encoder's outputs.

    The model has its method by now: a configuration may adapt other layers than --targets says.
    """
    cache = Path(speech.cache_dir)
    kept = speech.cache_encoder and not speech.spec_augment and not trains_encoder(model)
    rows = []
    for part, prints in zip(sets, sounds, strict=True):
        texts = text_tokens(part.clips, tokenizer, prompt, model.config.max_target_positions, speech.long_clips)
        heard: Any = features(model, part, prints, speech.window, cache)
        if kept:
            name = model_print(speech.model_name_or_path, model.config)
            heard = encoded_of(heard, model, name, cache)
        rows.append(SpeechRows(heard, texts))
    return rows


def features(model: Any, part: Set, prints: list[str], window: int, cache: Path) -> Features:
    """The features of a split for this model."""
    return features_of(part.clips, prints, part.seconds, model.config.num_mel_bins, window, cache)


def settings_of(method: MethodArguments, speech: SpeechArguments) -> dict[str, Any]:
    """The method's settings for Whisper's layers; full fine-tuning has none."""
    settings = method.settings(target_modules(speech.targets), None)
    return {} if method.method == "full" else settings


def untrained(plan: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
    """What training.json says of a model that is left as it is."""
    nothing = {"stored_parameters": {"parameters": 0, "bytes": 0}, "steps": 0, "train_seconds": 0.0}
    return {
        "settings": plan,
        "prompt": prompt.to_dict(),
        "validation_losses": [],
        "curve": [],
        "train_rows": 0,
        **nothing,
        **records.environment(),
    }


def of_speech(prompt: Prompt, trainer: AdapterTrainer, train: Set, rows: SpeechRows) -> dict[str, Any]:
    """What training.json has of a training on speech."""
    curve = [{"step": e["step"], "loss": e["eval_loss"]} for e in trainer.state.log_history if "eval_loss" in e]
    return {
        "prompt": prompt.to_dict(),
        "train_rows": len(rows),
        "train_minutes": round(sum(train.seconds[number] for number in rows.numbers) / 60, 2),
        "left_out": len(train.left_out) + len(train.clips) - len(rows),
        "validation_losses": [point["loss"] for point in curve],
        "curve": curve,
    }


if __name__ == "__main__":
    commands.run(main, "train_speech")
