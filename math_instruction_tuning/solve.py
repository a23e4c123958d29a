"""Answer the problems of GSM8K or MATH with a model and, if given, an adapter: the likeliest token each time.

    python math_instruction_tuning/solve.py runs/math/x openai/gsm8k             # into runs/math/x/gsm8k.jsonl
    python math_instruction_tuning/solve.py mistralai/Mistral-7B-v0.1 MATH_test.jsonl --adapter DIR --output FILE.jsonl
    python math_instruction_tuning/solve.py DIR test.jsonl --engine vllm --max_samples 100 --output FILE.jsonl

The first argument is the output folder of finetune_math.py, which stands for the run's base model with its adapter; or
a model on the hub, or its folder. The second is a file of problems or a set's name, as math_references.py takes them.

The prompt is the paper's: Alpaca's form, and "Let's think step by step." after "### Response:". A text ends at the end
token, or where the model begins a new "### Instruction:". (The authors' commands also end it at the bare words
"Instruction" and "Response", which cuts answers that have them; score_math.py's authors' rule does that to the text.)

Writes one JSON line per problem (number, question, output), as score_math.py takes it. Interrupted, it goes on where it
stopped. With --engine vllm an adapter is first merged into the weights, in a folder beside the output; with --as_lora
besides it is given to vLLM as LoRA, which is exact too, and the whole model is not written again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import math_references
from math_references import Problem
from vblora import models
from vblora.files.directory import CONFIG_FILE
from vblora.io import read_json, replacing, write_json
from vblora.models import Tuned, write_exported, write_merged
from vblora.sampling import spaced
from vblora_experiments import bars, commands, runs
from vblora_experiments.instruction_data import WITHOUT_INPUT
from vblora_experiments.progress import Progress

PROMPT = WITHOUT_INPUT + " Let's think step by step."
STOP = "### Instruction:"
VLLM_CHUNK = 512  # problems between two entries in the file of progress; vLLM batches within
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be made ready for


@dataclass(frozen=True)
class Options:
    """What is answered by what; each field is the flag of its name."""

    model: str
    problems: str
    output: Path | None = None
    engine: str = "transformers"
    as_lora: bool = False
    adapter: Path | None = None
    model_name_or_path: str | None = None
    bits: int | None = None
    dtype: str | None = None
    max_samples: int | None = None
    max_new_tokens: int = 1024
    batch_size: int = 16

    def __post_init__(self) -> None:
        commands.check_least(self, max_samples=1, max_new_tokens=1, batch_size=1)
        if self.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise ValueError("--engine vllm: vllm is not installed; leave --engine out to use transformers")
        if self.as_lora and self.engine != "vllm":
            raise ValueError("--as_lora goes with --engine vllm: transformers has the adapter as it is")


def main(arguments: list[str]) -> Path:
    """Answer what has no answer yet, and return the file of answers."""
    return solve(parse(arguments))


def solve(options: Options) -> Path:
    """Answer what has no answer yet; the file of answers."""
    tuned = Tuned.of(
        options.model,
        adapter=options.adapter,
        base=options.model_name_or_path,
        bits=options.bits,
        dtype=options.dtype,
    )
    problems = spaced(math_references.read(options.problems), options.max_samples)
    target = options.output or Path(options.model) / f"{problems[0].kind}.jsonl"
    if options.output is None and tuned.plan is None:
        raise ValueError("--output FILE.jsonl is needed where the model is no run")
    settings = {**tuned.settings(), "max_new_tokens": options.max_new_tokens, "engine": options.engine}
    settings |= {"as_lora": True} if options.as_lora else {}
    settings["problems"] = fingerprint(problems)
    note = target.with_suffix(".settings.json")
    if target.exists() and note.exists():
        if changed := runs.in_words(read_json(note), settings):
            raise ValueError(f"{target} has answers of other settings ({changed}): remove it, or give another --output")
        print(f"{target} is there already")
        return target
    done = Progress.of(target.with_suffix(".partial.jsonl"), settings, target)
    missing = [problem for problem in problems if problem.number not in done.texts]
    if missing:
        answer(engine_of(options, tuned, target.parent), missing, done)
    with replacing(target) as temporary:
        rows = [{"number": p.number, "question": p.question, "output": done.texts[p.number]} for p in problems]
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    write_json(note, settings)
    done.path.unlink()
    print(f"{target}: {len(problems)} problems answered")
    return target


def parse(arguments: list[str]) -> Options:
    parser = commands.one_line_errors(
        argparse.ArgumentParser(
            prog="solve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run's folder, a model on the hub, or its folder")
    parser.add_argument("problems", help=f"a file, or one of {', '.join(math_references.HUB)}")
    parser.add_argument("--output", type=Path, help="the file to write; for a run gsm8k.jsonl or math.jsonl in it")
    parser.add_argument("--engine", choices=("transformers", "vllm"))
    parser.add_argument("--as_lora", action="store_true", help="give vLLM the adapter as LoRA instead of merging it")
    parser.add_argument("--adapter", type=Path, help="an adapter's folder, this project's or PEFT's, or a packed file")
    parser.add_argument("--model_name_or_path", help="a run's base model; as in training unless given")
    parser.add_argument("--bits", type=int, choices=models.BITS, help="of the base model's weights; the run's, or 16")
    parser.add_argument("--dtype", help="of what is not quantised; the run's, or as it is kept")
    parser.add_argument("--max_samples", type=int, metavar="N", help="answer N problems, evenly spaced over the set")
    parser.add_argument("--max_new_tokens", type=int, help="tokens of an answer at most")
    parser.add_argument("--batch_size", type=int, help="of transformers; vLLM has its own")
    return commands.parsed(parser, Options, arguments)


def fingerprint(problems: Sequence[Problem]) -> str:
    """SHA-256 of the problems in use, the same whatever file they came from."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.number, problem.question, problem.reference]).encode() + b"\n")
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------- the engines


class Engine(Protocol):
    """What writes a text for each prompt, in batches of its own size."""

    batch_size: int
    tokenizer: Any

    def texts(self, prompts: list[list[int]]) -> list[str]: ...


def engine_of(options: Options, tuned: Tuned, place: Path) -> Engine:
    """The engine that was asked for, with the model in it; a merged one is kept in a folder in `place`."""
    if options.engine == "transformers":
        return TransformersEngine(tuned, options.max_new_tokens, options.batch_size)
    folder, lora = tuned.weights, None
    name = hashlib.sha256(json.dumps(tuned.settings()).encode()).hexdigest()[:12]
    if options.as_lora:
        lora = lora_of(tuned, place / f"lora-{name}")
    elif tuned.adapter is not None:
        merged = place / f"merged-{name}"
        folder = str(merged if merged.exists() else write_merged(tuned, merged))
    elif tuned.bits != 16:
        raise ValueError(f"--bits {tuned.bits} does nothing with --engine vllm where there is no adapter: leave it out")
    return VllmEngine(folder, tuned.dtype, options.max_new_tokens, lora)


def lora_of(tuned: Tuned, folder: Path) -> Path:
    """The adapter as plain LoRA: PEFT's own as it is, another one in this folder."""
    if tuned.adapter is None:
        raise ValueError(f"--as_lora: {tuned.base} comes with no adapter")
    if tuned.bits != 16:
        raise ValueError("--as_lora would add the adapter to weights that are not quantised: leave it out to merge")
    if tuned.adapter.is_dir() and read_json(tuned.adapter / CONFIG_FILE).get("peft_type") == "LORA":
        return tuned.adapter
    return folder if folder.exists() else write_exported(tuned, folder)


class TransformersEngine:
    """transformers' generate, padded on the left."""

    def __init__(self, tuned: Tuned, max_new_tokens: int, batch_size: int) -> None:
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.model, self.tokenizer = tuned.load(), models.load_tokenizer(tuned.base)
        self.tokenizer.padding_side = "left"

    def texts(self, prompts: list[list[int]]) -> list[str]:
        batch = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        output = self.model.generate(
            input_ids=batch["input_ids"].to(self.model.device),
            attention_mask=batch["attention_mask"].to(self.model.device),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=None,
            max_new_tokens=self.max_new_tokens,
            stop_strings=[STOP],
            tokenizer=self.tokenizer,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        return self.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


class VllmEngine:
    """vLLM on a whole model, with an adapter as LoRA if one is given."""

    batch_size = VLLM_CHUNK

    def __init__(self, folder: str, dtype: str, max_new_tokens: int, lora: Path | None = None) -> None:
        from vllm import LLM, SamplingParams

        self.tokenizer = models.load_tokenizer(folder)
        # Compiling pays on a GPU; on a CPU it takes minutes.
        settings: dict[str, Any] = {"generation_config": "vllm", "enforce_eager": not torch.cuda.is_available()}
        self.given: dict[str, Any] = {}
        if lora is not None:
            from vllm.lora.request import LoRARequest

            rank = read_json(lora / CONFIG_FILE)["r"]
            settings |= {"enable_lora": True, "max_lora_rank": min(r for r in LORA_RANKS if r >= rank)}
            self.given = {"lora_request": LoRARequest("adapter", 1, str(lora.resolve()))}
        self.engine = LLM(model=folder, dtype=dtype, **settings)
        self.sampling = SamplingParams(temperature=0, max_tokens=max_new_tokens, stop=[STOP])

    def texts(self, prompts: list[list[int]]) -> list[str]:
        found = self.engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], self.sampling, **self.given)
        return [output.outputs[0].text for output in found]


def answer(engine: Engine, problems: Sequence[Problem], done: Progress) -> None:
    """Answer the problems, longest first."""
    tokenizer = engine.tokenizer
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    texts = [PROMPT.format(instruction=problem.question) for problem in problems]
    encoded = {
        problem.number: [*first, *ids]
        for problem, ids in zip(problems, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True)
    }
    order = sorted(encoded, key=lambda number: -len(encoded[number]))
    with bars.counter(len(order), "answering") as count:
        for at in range(0, len(order), engine.batch_size):
            numbers = order[at : at + engine.batch_size]
            written = engine.texts([encoded[number] for number in numbers])
            done.add({number: cut(text) for number, text in zip(numbers, written, strict=True)})
            count.update(len(numbers))


def cut(text: str) -> str:
    """The text before a new instruction, if it begins one."""
    return text.split(STOP)[0].strip()


if __name__ == "__main__":
    commands.run(main, "solve")
