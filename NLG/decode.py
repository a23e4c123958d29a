"""Decode a run of train.py: one text for every distinct meaning representation, by beam search.

    python NLG/decode.py runs/e2e/try                      # the test set, into runs/e2e/try/test.txt
    python NLG/decode.py runs/e2e/try --data_dir DIR --model_name_or_path DIR --batch_size 32 --merge

Settings are those of LoRA's E2E command: beam 10, length penalty 0.8, at most 64 tokens, and no 4-gram of the text
twice (those of the source do not count). The text ends at the end token or at an empty line.

Writes SPLIT.txt (one text per line, in the order of the set, as score.py takes it) and SPLIT.jsonl (source, text and
references, for reading). Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from causal_text import prompts
from e2e_data import SPLITS, Group, fingerprint, group, load_split
from generation import Decoding, generate
from vblora.io import read_json, replacing, write_json
from vblora.models import PLAN_FILE, Tuned, load_tokenizer
from vblora_experiments import bars, commands, runs
from vblora_experiments.progress import Progress


@dataclass(frozen=True)
class Options:
    """What is decoded, and how.

    Attributes:
        run: the output folder of train.py.
        decoding: how texts are searched for.
        split: of the set.
        data_dir: the folder with the set's files; the hub where None.
        model_name_or_path: the base model; as in training where None.
        max_samples: of the representations, the first so many; all where None.
        batch_size: representations at a time.
        merge: add the adapter to the weights first.
    """

    run: Path
    decoding: Decoding
    split: str = "test"
    data_dir: str | None = None
    model_name_or_path: str | None = None
    max_samples: int | None = None
    batch_size: int = 16
    merge: bool = False


def main(arguments: list[str]) -> Path:
    """Decode, and return the file of texts."""
    return decode_split(parse(arguments))


def decode_split(options: Options) -> Path:
    """Decode a split, unless that is done; the file of texts.

    Raises:
        ValueError: the folder is no run, or has texts of other settings.
    """
    commands.check_least(options, batch_size=1, max_samples=1)
    decoding = options.decoding
    if not (options.run / PLAN_FILE).exists():
        raise ValueError(f"{options.run} holds no run of train.py")
    tuned = Tuned.of(str(options.run), base=options.model_name_or_path)
    if tuned.plan is None or "dataset" not in tuned.plan:
        raise ValueError(f"{options.run} is no run of NLG/train.py")
    examples = load_split(tuned.plan["dataset"], options.split, options.data_dir)
    groups = group(examples)[: options.max_samples]
    settings = {**decoding.to_dict(), "merge": options.merge, "data": fingerprint(examples), "texts": len(groups)}
    target, note = options.run / f"{options.split}.txt", options.run / f"{options.split}.decoding.json"
    if target.exists() and note.exists():
        if changed := runs.in_words(read_json(note), settings):
            raise ValueError(f"{target} has texts of other settings ({changed}): remove it first")
        print(f"{target} is there already")
        return target
    # Who removes the texts to have others may leave what stands beside them; without a note it is somebody's own.
    beside = [] if note.exists() else [target.with_suffix(".jsonl")]
    done = Progress.of(options.run / f"{options.split}.partial.jsonl", settings, target, *beside)
    missing = [number for number in range(len(groups)) if number not in done.texts]
    if missing:
        model, tokenizer = tuned.load(options.merge), load_tokenizer(tuned.base)
        tokenizer.padding_side = "left"
        decode(model, tokenizer, groups, missing, options.batch_size, decoding, done)
    texts = [done.texts[number] for number in range(len(groups))]
    with replacing(target) as temporary:
        temporary.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    with replacing(target.with_suffix(".jsonl")) as temporary:
        lines = [
            json.dumps({"source": g.source, "text": text, "references": g.references}, ensure_ascii=False)
            for g, text in zip(groups, texts, strict=True)
        ]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(note, settings)
    done.path.unlink()
    print(f"{target}: {len(texts)} texts, {sum(not text for text in texts)} of them empty")
    return target


def parse(arguments: list[str]) -> Options:
    parser = HfArgumentParser(
        Decoding,  # type: ignore[arg-type]
        prog="decode.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the output folder of train.py")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--data_dir", help="folder with the set's files; the hub unless given")
    parser.add_argument("--model_name_or_path", help="the base model; as in training unless given")
    parser.add_argument("--max_samples", type=int, help="decode the first representations only")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--merge", action="store_true", help="add the adapter to the weights first")
    known = vars(parser.parse_args(arguments))
    return Options(decoding=Decoding(**{name: known.pop(name) for name in Decoding.__dataclass_fields__}), **known)


def decode(
    model: Any,
    tokenizer: Any,
    groups: list[Group],
    missing: list[int],
    batch_size: int,
    decoding: Decoding,
    done: Progress,
) -> None:
    """Decode what is missing, longest sources first."""
    encoded = prompts([g.source for g in groups], tokenizer)
    order = sorted(missing, key=lambda number: -len(encoded[number]))
    with bars.counter(len(order), "decoding") as count:
        for at in range(0, len(order), batch_size):
            numbers = order[at : at + batch_size]
            texts = generate(model, tokenizer, [encoded[number] for number in numbers], decoding)
            done.add(dict(zip(numbers, texts, strict=True)))
            count.update(len(numbers))


if __name__ == "__main__":
    commands.run(main, "decode")
