"""One run of Table 4: train a row, answer GSM8K and MATH, score the answers, and write a record.

    python math_instruction_tuning/run_math.py --row mistral_7b/vblora --seed 0
    python math_instruction_tuning/run_math.py --row smollm2_135m/lora --model_name_or_path DIR --data FILE.json \\
        --gsm8k test.jsonl --math none --test_samples 100

Takes the flags of finetune_math.py and those below; flags after --row override the row. The output folder receives what
finetune_math.py and solve.py write, and record.json: settings, both scores of each set, stored parameters, times. A run
that has a record is not run again, but for sets that it lacks; one that was interrupted goes on.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import finetune_math
import math_references
import math_scores
import solve
from vblora.sampling import spaced
from vblora_experiments import commands, instruct, publishing, runs, training_run
from vblora_experiments.command_line import StartArguments
from vblora_experiments.instruct import Run

SETS = {"gsm8k": "openai/gsm8k", "math": "EleutherAI/hendrycks_math"}
NONE = "none"


@dataclass
class ProblemArguments:
    """Which problems are answered, and how."""

    gsm8k: str = field(default=SETS["gsm8k"], metadata={"help": f"test problems: a file, {SETS['gsm8k']}, or none"})
    math: str = field(default=SETS["math"], metadata={"help": f"test problems: a file, {SETS['math']}, or none"})
    test_samples: int | None = field(
        default=None, metadata={"help": "answer this many problems of each set, evenly spaced"}
    )
    max_new_tokens: int = field(default=1024, metadata={"help": "tokens of an answer at most"})
    engine: Literal["transformers", "vllm"] = field(
        default="transformers", metadata={"help": "what writes the answers"}
    )
    solve_batch_size: int = field(default=16, metadata={"help": "problems at a time; vLLM has its own"})


SCRIPT = finetune_math.FOLDER.script("run_math.py", ProblemArguments, description=str(__doc__))


def main(arguments: list[str]) -> dict[str, Any]:
    """Run, and return the record; with --plan print and return what finetune_math.py estimates."""
    one = parse(arguments)
    return instruct.planned(one) if one.settings.show() else run(one)


def parse(arguments: list[str]) -> Run:
    """The settings of a command line, checked. The test problems too: a wrong file would be found hours later."""
    one = Run(SCRIPT.read(arguments))
    own = one.settings.of(ProblemArguments)
    for name in SETS if not one.settings.of(StartArguments).plan else ():
        if (place := getattr(own, name)) != NONE and place not in math_references.HUB:
            math_references.read(place, name)
    commands.check_least(own, test_samples=1, max_new_tokens=1, solve_batch_size=1)
    return one


def run(one: Run) -> dict[str, Any]:
    """Train, answer and score, as far as that is not done; the record."""
    own, out = one.settings.of(ProblemArguments), one.settings.output_dir
    trained = instruct.train(one)
    if not trained:  # another process of this run writes
        return {}
    testing = {"test_samples": own.test_samples, "max_new_tokens": own.max_new_tokens, "engine": own.engine}
    record = training_run.record_of(one.settings, "testing", testing, lambda: make_record(out, trained, testing))
    for name in SETS:
        if getattr(own, name) == NONE:
            continue
        if name not in record["scores"]:
            record["scores"][name] = test(name, out, one, own)
            runs.finish(out, record)
        elif record["scores"][name]["fingerprint"] != solve.fingerprint(problems_of(name, own)):
            raise ValueError(f"{out} holds scores of other problems than --{name}: give another --output_dir")
    print(summary(record))
    return publishing.published(one.training, record)


def test(name: str, out: Path, one: Run, own: ProblemArguments) -> dict[str, Any]:
    """Both scores of one set, and the seconds that its answers took."""
    began = time.monotonic()
    target = solve.solve(
        solve.Options(
            str(out),
            getattr(own, name),
            model_name_or_path=one.instruct.model_name_or_path,
            engine=own.engine,
            max_new_tokens=own.max_new_tokens,
            batch_size=own.solve_batch_size,
            max_samples=own.test_samples,
        )
    )
    answers = math_scores.read_outputs(target)
    seconds = round(time.monotonic() - began, 1)
    problems = problems_of(name, own)
    scores = math_scores.score(answers, problems, workers=os.cpu_count() or 1)
    del scores["listed"]  # score_math.py --list gives it again
    return scores | {"seconds": seconds, "fingerprint": solve.fingerprint(problems)}


def problems_of(name: str, own: ProblemArguments) -> list[math_references.Problem]:
    """The problems of one set that are answered."""
    return spaced(math_references.read(getattr(own, name), name), own.test_samples)


def make_record(out: Path, trained: dict[str, Any], testing: dict[str, Any]) -> dict[str, Any]:
    """Everything there is to know of the run; no set is scored yet."""
    return {
        **training_run.heading("math", trained),
        "testing": testing,
        "scores": {},  # by set
        "bytes_on_disk": training_run.bytes_on_disk(out),
    }


def summary(record: dict[str, Any]) -> str:
    parts = [
        f"{name} {scores['rules']['authors']['accuracy']:.2f} by the authors' rule, "
        f"{scores['rules']['corrected']['accuracy']:.2f} corrected"
        for name, scores in record["scores"].items()
    ]
    return f"{record['method']}: {'; '.join(parts)}; {record['stored_parameters']['parameters']:,} stored parameters"


if __name__ == "__main__":
    commands.run(main, "run_math")
