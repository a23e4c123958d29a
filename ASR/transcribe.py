"""Transcribe recordings with a run of train_speech.py, in batches.

    python ASR/transcribe.py runs/asr/try --data_dir DIR                  # test.tsv of DIR, into runs/asr/try/test.tsv
    python ASR/transcribe.py runs/asr/try --data_dir DIR --split dev --beam 5 --merge

Writes SPLIT.tsv with the columns path and text, as `score_speech.py` takes it; DIR's table needs no texts. A
text that has not ended after --max_new_tokens is cut there, and such texts are counted. Interrupted, it goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vblora_experiments import commands  # it quiets what transformers imports

# isort: split
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, HfArgumentParser

from features import Features, features_of
from speech_data import SPLITS, Set, fingerprint, load_split, refuse_same, sound_prints
from train_speech import RUNS, ZERO_SHOT
from vblora.io import read_json, replacing, write_json
from vblora.models import PLAN_FILE, Tuned, own_device, with_adapter
from vblora_experiments import bars, runs
from vblora_experiments.progress import Progress
from vblora_experiments.text_files import parsed_json
from whisper_models import Prompt, load_tokenizer, load_whisper, prompt_of


@dataclass
class Decoding:
    """How texts are decoded."""

    beam: int = field(default=1, metadata={"help": "beams; 1 takes the likeliest token each time"})
    max_new_tokens: int = field(default=224, metadata={"help": "tokens of a text at most"})

    def __post_init__(self) -> None:
        commands.check_least(self, beam=1, max_new_tokens=1)


@dataclass(frozen=True)
class Options:
    """What is transcribed, and how.

    Attributes:
        run: the output folder of train_speech.py.
        data_dir: the folder with the split's table.
        decoding: how texts are decoded.
        split: of the data.
        model_name_or_path: the base model; as in training where None.
        batch_size: recordings at a time.
        merge: add the adapter to the weights first.
        cache_dir: where features are kept.
    """

    run: Path
    data_dir: Path
    decoding: Decoding
    split: str = "test"
    model_name_or_path: str | None = None
    batch_size: int = 16
    merge: bool = False
    cache_dir: Path = RUNS / "cache"


def main(arguments: list[str]) -> Path:
    """Transcribe, and return the file of texts."""
    return transcribe_split(parse(arguments))


def transcribe_split(options: Options) -> Path:
    """Transcribe a split, unless that is done; the file of texts.

    Raises:
        ValueError: the folder is no run, or has texts of other settings.
    """
    commands.check_least(options, batch_size=1)
    decoding = options.decoding
    refuse_same(options.data_dir, options.run)
    if not (options.run / PLAN_FILE).exists():
        raise ValueError(f"{options.run} holds no run of train_speech.py")
    tuned = Tuned.of(str(options.run), base=options.model_name_or_path)
    plan = tuned.plan
    if plan is None or "language" not in plan:
        raise ValueError(f"{options.run} is no run of ASR/train_speech.py")
    part = load_split(options.data_dir, options.split, plan["window"], plan["long_clips"], needs_texts=False)
    sounds = sound_prints(part.clips)
    made_with = {"data": fingerprint(part.clips, sounds), "run": runs.plan_print(plan)}
    settings = {**asdict(decoding), "merge": options.merge, **made_with}
    target, note = options.run / f"{options.split}.tsv", options.run / f"{options.split}.decoding.json"
    if target.exists() and note.exists():
        before = {"run": settings["run"], **read_json(note)}  # an older note does not say of which run
        if changed := runs.in_words({name: before.get(name) for name in settings}, settings):
            raise ValueError(f"{target} has texts of other settings ({changed}): remove it first")
        print(f"{target} is there already")
        return target
    done = Progress.of(options.run / f"{options.split}.partial.jsonl", settings, target)
    missing = [number for number in range(len(part.clips)) if number not in done.texts]
    if missing:
        decode(load(tuned, options.merge), tuned, part, sounds, missing, options, done)
    texts = [_read(done.texts[number], f"{done.path}, clip {number}") for number in range(len(part.clips))]
    with replacing(target) as temporary:
        rows = "".join(f"{clip.name}\t{text['text']}\n" for clip, text in zip(part.clips, texts, strict=True))
        temporary.write_text(f"path\ttext\n{rows}", encoding="utf-8")
    cut = sum(not text["ended"] for text in texts)
    write_json(note, {**settings, "cut": cut, "left_out": len(part.left_out)})
    done.path.unlink()
    print(f"{target}: {len(texts)} texts, {cut} of them cut at {decoding.max_new_tokens} tokens")
    return target


def _read(text: str, where: str) -> dict[str, Any]:
    """What `decode` has kept of a clip."""
    value = parsed_json(text, where)
    if not isinstance(value, dict) or not isinstance(value.get("text"), str) or "ended" not in value:
        raise ValueError(f"{where}: no text of a clip; the file is damaged: remove it")
    return value


def parse(arguments: list[str]) -> Options:
    parser = commands.one_line_errors(
        HfArgumentParser(
            Decoding,  # type: ignore[arg-type]
            prog="transcribe.py",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    parser.add_argument("run", type=Path, help="the output folder of train_speech.py")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with the split's table")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--model_name_or_path", help="the base model; as in training unless given")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--merge", action="store_true", help="add the adapter to the weights first")
    parser.add_argument("--cache_dir", type=Path, default=RUNS / "cache", help="where features are kept")
    known = vars(parser.parse_args(arguments))
    return Options(decoding=Decoding(**{name: known.pop(name) for name in Decoding.__dataclass_fields__}), **known)


def load(tuned: Tuned, merge: bool = False) -> Any:
    """The run's model in evaluation mode, on this process's device."""
    plan = tuned.plan
    assert plan is not None
    if plan["method"] == ZERO_SHOT:
        tuned = replace(tuned, adapter=None)
    model = load_whisper(tuned.weights, tuned.dtype, plan["window"]).to(own_device())
    if tuned.adapter is not None:
        model = with_adapter(model, tuned.adapter, merge)
    return model.eval()


def decode(
    model: Any,
    tuned: Tuned,
    part: Set,
    sounds: list[str],
    missing: list[int],
    options: Options,
    done: Progress,
) -> None:
    """Transcribe what is missing, longest recordings first."""
    tokenizer, whisper, plan = load_tokenizer(tuned.base), whisper_of(model), tuned.plan
    assert plan is not None
    prompt = prompt_of(whisper, tokenizer, plan["language"], plan.get("language_token"))
    mels = whisper.config.num_mel_bins
    heard = features_of(part.clips, sounds, part.seconds, mels, plan["window"], options.cache_dir)
    order = sorted(missing, key=lambda number: -part.seconds[number])
    warn_of_long(part, tokenizer, options.decoding.max_new_tokens)
    with bars.counter(len(order), "transcribing") as count:
        for at in range(0, len(order), options.batch_size):
            numbers = order[at : at + options.batch_size]
            found = texts_of(whisper, tokenizer, batch_of(heard, numbers), prompt, options.decoding)
            entries = [json.dumps({"text": text, "ended": ended}) for text, ended in found]
            done.add(dict(zip(numbers, entries, strict=True)))
            count.update(len(numbers))


def warn_of_long(part: Set, tokenizer: Any, most: int) -> None:
    """Say how many transcripts are longer than a text may become: their rates have a floor."""
    texts = tokenizer([f" {clip.text}" for clip in part.clips], add_special_tokens=False)["input_ids"]
    sizes = [len(ids) + 1 for ids in texts]  # with the end
    if longer := sum(size > most for size in sizes):
        found = f"{longer} of {len(sizes)} transcripts have more than {most} tokens (up to {max(sizes)})"
        print(f"warning: {found} and cannot be said whole: raise --max_new_tokens", flush=True)


def batch_of(heard: Features, numbers: list[int]) -> Tensor:
    return torch.stack([heard.of(number) for number in numbers])


@torch.no_grad()
def texts_of(
    whisper: Any, tokenizer: Any, features: Tensor, prompt: Prompt, decoding: Decoding
) -> list[tuple[str, bool]]:
    """The text of each recording, and whether it came to its end; features of shape (batch, mels, frames).

    transformers' plain search is used: Whisper's own would look for languages and for further windows.
    """
    ids = torch.tensor([prompt.ids] * len(features), device=whisper.device)
    output = GenerationMixin.generate(
        whisper,
        input_features=features.to(whisper.device, whisper.dtype),
        attention_mask=torch.ones(features.shape[::2], device=whisper.device),  # silence at the end is heard too
        decoder_input_ids=ids,
        generation_config=search(whisper, prompt, decoding),
    )
    said = output[:, ids.shape[1] :]
    ended = (said == tokenizer.eos_token_id).any(dim=1).tolist()
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    return [(" ".join(text.split()), end) for text, end in zip(texts, ended, strict=True)]


def search(whisper: Any, prompt: Prompt, decoding: Decoding) -> GenerationConfig:
    """The search, with the tokens that Whisper's own never says."""
    own = whisper.generation_config
    return GenerationConfig(
        num_beams=decoding.beam,
        do_sample=False,
        max_length=min(len(prompt.ids) + decoding.max_new_tokens, whisper.config.max_target_positions),
        suppress_tokens=own.suppress_tokens,
        begin_suppress_tokens=own.begin_suppress_tokens,
        decoder_start_token_id=whisper.config.decoder_start_token_id,
        bos_token_id=whisper.config.bos_token_id,
        eos_token_id=whisper.config.eos_token_id,
        pad_token_id=whisper.config.pad_token_id,
    )


def whisper_of(model: Any) -> Any:
    """The Whisper itself; a method of PEFT's wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


if __name__ == "__main__":
    commands.run(main, "transcribe")
