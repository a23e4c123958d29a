"""Answer MT-Bench's questions, both turns of each, with a model and, if given, an adapter.

    python instruction_tuning/mt_bench_answer.py runs/instruct/x --model_id vblora-7b
    python instruction_tuning/mt_bench_answer.py meta-llama/Llama-2-7b-hf --adapter DIR --model_id lora --bits 4
    python instruction_tuning/mt_bench_answer.py DIR --model_id base --output data/mt_bench --bench_dir DIR

The first argument is the output folder of finetune.py, which stands for the run's base model (in the run's bits and
precision) with its adapter; or a model on the hub, or its folder. Writes OUTPUT/model_answer/MODEL_ID.jsonl as
FastChat's gen_model_answer.py does, and the settings beside it. Interrupted, it goes on where it stopped.

The dialogue is written as the model knows it: for a run in the form it was trained on, Alpaca's; else in the
tokenizer's chat template or, where it has none, in Alpaca's form. The temperature is that of the question's category;
what else sampling can be told is left to the model's own generation settings, and the generator starts from the seed
at each question: FastChat's way, whose first choice is seed 0.
"""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from mt_bench import Answer, Bench, Question, answers_file, append_line, mend_end, read_answers, write_lines
from vblora import models
from vblora.io import read_json, write_json
from vblora.models import Tuned
from vblora.sampling import spaced
from vblora_experiments import bars, commands, progress, runs
from vblora_experiments.instruction_data import DATA_FORMATS, WITHOUT_INPUT

TEMPLATES = ("auto", "chat", "alpaca")
INSTRUCTION = "### Instruction:"


@dataclass(frozen=True)
class Options:
    """What is answered by what; each field is the flag of its name."""

    model: str
    model_id: str
    output: Path = Path("data/mt_bench")
    bench_dir: Path | None = None
    adapter: Path | None = None
    model_name_or_path: str | None = None
    template: str = "auto"
    max_new_tokens: int = 1024
    seed: int = 0
    bits: int | None = None
    dtype: str | None = None
    questions: Sequence[int] | None = None
    max_questions: int | None = None

    def __post_init__(self) -> None:
        commands.check_least(self, max_new_tokens=1, max_questions=1)
        if self.dtype not in (None, "auto"):
            models.torch_dtype(str(self.dtype))


def main(arguments: list[str]) -> Path:
    """Answer what has no answer yet, and return the file of answers."""
    return answer_questions(parse(arguments))


def answer_questions(options: Options) -> Path:
    """Answer what has no answer yet; the file of answers."""
    tuned = Tuned.of(
        options.model,
        adapter=options.adapter,
        base=options.model_name_or_path,
        bits=options.bits,
        dtype=options.dtype,
    )
    bench = Bench.of(options.bench_dir)
    questions = chosen(bench.questions(), options.questions, options.max_questions)
    tokenizer = models.load_tokenizer(tuned.base)
    template = template_for(tokenizer, options.template, tuned.plan is not None)
    own = {"template": template, "max_new_tokens": options.max_new_tokens, "seed": options.seed}
    target = answers_file(options.output, options.model_id)
    settings = {**tuned.settings(), **own, "questions": bench.fingerprint()}
    with progress.alone(target):
        done = begin(target, settings)
        if missing := [question for question in questions if question.question_id not in done]:
            print(f"{target}: {len(missing)} questions to answer, in the {template} template")
            answer_all(tuned.load(), tokenizer, missing, settings, options.model_id, target, done)
        write_lines(target, [done[number].to_row() for number in sorted(done)])
        partial_file(target).unlink(missing_ok=True)
    empty = sum(not turn for row in done.values() for turn in row.turns)
    print(f"{target}: {len(done)} questions answered, {empty} of the {2 * len(done)} turns empty")
    return target


def parse(arguments: list[str]) -> Options:
    parser = commands.one_line_errors(
        argparse.ArgumentParser(
            prog="mt_bench_answer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a model on the hub, its folder, or that of a run")
    parser.add_argument("--model_id", required=True, help="what the answers' model is called, in the files too")
    parser.add_argument("--output", type=Path, help="data/mt_bench unless given")
    parser.add_argument("--bench_dir", type=Path, help="folder with MT-Bench's files; downloaded once unless given")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter: this project's or PEFT's")
    parser.add_argument("--model_name_or_path", help="a run's base model; as in training unless given")
    parser.add_argument("--template", choices=TEMPLATES, help="auto: as said above")
    parser.add_argument("--max_new_tokens", type=int, help="tokens of a turn at most")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--bits", type=int, choices=models.BITS, help="of the base model's weights; the run's, or 16")
    parser.add_argument("--dtype", help="of what is not quantised; the run's, or auto: as it is kept")
    parser.add_argument("--questions", type=int, nargs="+", metavar="ID", help="answer these only")
    parser.add_argument(
        "--max_questions", type=int, metavar="N", help="answer N of them, evenly spaced over the categories"
    )
    return commands.parsed(parser, Options, arguments)


def chosen(questions: dict[int, Question], ids: Sequence[int] | None, most: int | None) -> list[Question]:
    """The questions asked for; all unless some are."""
    if unknown := sorted(set(ids or ()) - questions.keys()):
        raise ValueError(
            f"--questions: MT-Bench has no question {unknown[0]}, but {min(questions)} to {max(questions)}"
        )
    return spaced([question for number, question in questions.items() if not ids or number in ids], most)


# ------------------------------------------------------------------------------------------------ progress


def begin(target: Path, settings: dict[str, Any]) -> dict[int, Answer]:
    """The answers there are already, by question: of the finished file, and of an interrupted run.

    Raises:
        ValueError: they were made with other settings, or nothing says with which.
    """
    note, partial = target.with_suffix(".settings.json"), partial_file(target)
    other = "give another --model_id or --output, or remove it"
    if note.exists():
        if changed := runs.in_words(read_json(note), settings):
            raise ValueError(f"{target} belongs to answers with other settings ({changed}): {other}")
    elif target.exists():
        raise ValueError(f"{target} was not written by this command, so it cannot be added to: {other}")
    write_json(note, settings)
    mend_end(partial)
    rows = [row for path in (target, partial) if path.exists() for row in read_answers(path)]
    return {row.question_id: row for row in rows}


def partial_file(target: Path) -> Path:
    """Where answers are kept until all are there; FastChat takes each *.jsonl in the folder for a model's."""
    return target.with_suffix(".jsonl.partial")


# --------------------------------------------------------------------------------------------- the dialogue


def template_for(tokenizer: Any, wanted: str, is_run: bool) -> str:
    """The template to use: as said at the top, unless told otherwise."""
    has_own = bool(tokenizer.chat_template)
    if wanted == "chat" and not has_own:
        raise ValueError("--template chat: the tokenizer has no chat template; use --template alpaca")
    return ("chat" if has_own and not is_run else "alpaca") if wanted == "auto" else wanted


def answer_all(
    model: Any,
    tokenizer: Any,
    questions: list[Question],
    settings: dict[str, Any],
    model_id: str,
    target: Path,
    done: dict[int, Answer],
) -> None:
    """Answer these questions with a run's settings, and keep each answer as it comes."""
    for number, question in enumerate(bars.bar(questions, "answering"), 1):
        began = time.monotonic()
        turns = answer(model, tokenizer, question, settings["template"], settings["max_new_tokens"], settings["seed"])
        row = Answer(question.question_id, uuid.uuid4().hex, model_id, turns, time.time())
        append_line(partial_file(target), row.to_row())
        done[question.question_id] = row
        seconds = time.monotonic() - began
        print(f"{number}/{len(questions)}: question {question.question_id}, {seconds:.1f} s", flush=True)


def answer(model: Any, tokenizer: Any, question: Question, template: str, max_new_tokens: int, seed: int) -> list[str]:
    """The model's answer to each turn, those before in its prompt."""
    torch.manual_seed(seed)
    said: list[str] = []
    for turn in range(len(question.turns)):
        encoded = prompt(tokenizer, template, question.turns[: turn + 1], said)
        room = getattr(model.config, "max_position_embeddings", None)
        most = max_new_tokens if room is None else min(max_new_tokens, room - len(encoded))
        if most < 1:
            raise ValueError(
                f"question {question.question_id}, turn {turn + 1}: the prompt's {len(encoded)} tokens leave no room "
                f"in the model's {room}: give a smaller --max_new_tokens"
            )
        stop = INSTRUCTION if template == "alpaca" else None
        said.append(generate(model, tokenizer, encoded, question.temperature, most, stop))
    return said


def prompt(tokenizer: Any, template: str, asked: list[str], said: list[str]) -> list[int]:
    """The tokens of a dialogue in which the last of `asked` waits for its answer.

    Alpaca knows one turn only; a second goes on after the first answer in the same form.
    """
    if template == "chat":
        messages = [{"role": "user", "content": asked[0]}]
        for reply, following in zip(said, asked[1:], strict=True):
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": following}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote those
    # The first token, the text and the space at its end are those of the training.
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    text, _, form = WITHOUT_INPUT.partition(INSTRUCTION)
    for number, instruction in enumerate(asked):
        text += INSTRUCTION + form.format(instruction=instruction) + DATA_FORMATS["alpaca"].end
        text += f"{said[number]}\n\n" if number < len(said) else ""
    return first + list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, encoded: list[int], temperature: float, max_new_tokens: int, stop: str | None
) -> str:
    """One text, greedily at temperature 0; it ends at an end token or before the text `stop`."""
    ids = torch.tensor([encoded], device=model.device)
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    # Greedy, the model's own settings of sampling have no use, and transformers says so at each call.
    names = ("temperature", "top_p", "top_k")
    how: dict[str, Any] = {"temperature": temperature} if temperature else dict.fromkeys(names)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=temperature > 0,
        **how,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),  # a single text has no padding
        stopping_criteria=StoppingCriteriaList([Says(stop, tokenizer, len(encoded))] if stop else []),
    )
    text = str(tokenizer.decode(output[0, len(encoded) :], skip_special_tokens=True))
    return (text.partition(stop)[0] if stop else text).strip()


class Says(StoppingCriteria):
    """Ends a generation once its last tokens hold a text."""

    def __init__(self, text: str, tokenizer: Any, prompt_length: int) -> None:
        self.text, self.tokenizer, self.prompt_length = text, tokenizer, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        last = input_ids[0, self.prompt_length :][-2 * len(self.text) :]  # of ASCII a token is a character at least
        return torch.tensor([self.text in self.tokenizer.decode(last)], device=input_ids.device)


if __name__ == "__main__":
    commands.run(main, "mt_bench_answer")
