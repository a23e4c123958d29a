"""One run of Table 4: train a row, answer GSM8K and MATH, score the answers, and write a record.

    python math_instruction_tuning/run_math.py --row mistral_7b/vblora --seed 0
    python math_instruction_tuning/run_math.py --row smollm2_135m/lora --model_name_or_path DIR --data FILE.json \\
        --gsm8k test.jsonl --math none --test_samples 100

Takes the flags of finetune_math.py and those below; flags after --row override the row. The output folder receives what
finetune_math.py and solve.py write, and record.json: settings, both scores of each set, stored parameters, times. A run
that has a record is not run again, but for sets that it lacks; one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import finetune_math
import math_references
import math_scores
import solve
from math_rows import row
from vblora.sampling import spaced
from vblora_experiments import commands, instruct, runs
from vblora_experiments.arguments import with_row
from vblora_experiments.instruct import Run

SETS = {"gsm8k": "openai/gsm8k", "math": "EleutherAI/hendrycks_math"}
NONE = "none"


def main(arguments: list[str]) -> dict[str, Any]:
    """Run, and return the record; with --plan what finetune_math.py returns."""
    own, rest = parse(arguments)
    run = instruct.parse(rest, finetune_math.FOLDER)
    if run.instruct.plan:
        return finetune_math.main(rest)
    out = Path(str(run.training.output_dir))
    check_sets(own)
    trained = finetune_math.main([*rest, "--output_dir", str(out)])
    if not trained:  # another process of this run writes
        return {}
    testing = {"test_samples": own.test_samples, "max_new_tokens": own.max_new_tokens, "engine": own.engine}
    record = runs.finished(out, "testing", testing)
    if record is None:
        record = make_record(out, trained, testing)
        record |= {"row": own.row, "overrides": runs.overrides(arguments)}
    for name in SETS:
        if getattr(own, name) == NONE:
            continue
        if name not in record["scores"]:
            record["scores"][name] = test(name, out, run, own)
            runs.finish(out, record)
        elif record["scores"][name]["fingerprint"] != solve.fingerprint(problems_of(name, own)):
            raise ValueError(f"{out} holds scores of other problems than --{name}: give another --output_dir")
    print(summary(record))
    return record


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's own flags, and finetune_math.py's."""
    arguments = with_row(arguments, row)
    parser = commands.one_line_errors(
        argparse.ArgumentParser(
            prog="run_math.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.allow_abbrev = False
    parser.add_argument("--row", help="MODEL/METHOD: take the flags of this row of math_rows.py")
    for name, place in SETS.items():
        parser.add_argument(f"--{name}", default=place, help=f"test problems: a file, {place}, or none")
    parser.add_argument("--test_samples", type=int, help="answer this many problems of each set, evenly spaced")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="tokens of an answer at most")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--solve_batch_size", type=int, default=16)
    own, rest = parser.parse_known_args(arguments)
    return own, rest


def check_sets(own: argparse.Namespace) -> None:
    """Look at the test problems before the training: a wrong file would be found hours later."""
    for name in SETS:
        if (place := getattr(own, name)) != NONE and place not in math_references.HUB:
            math_references.read(place, name)
    for name in ("test_samples", "max_new_tokens", "solve_batch_size"):
        if (value := getattr(own, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")


def test(name: str, out: Path, run: Run, own: argparse.Namespace) -> dict[str, Any]:
    """Both scores of one set, and the seconds that its answers took."""
    began, place = time.monotonic(), getattr(own, name)
    command = [str(out), place, "--model_name_or_path", run.instruct.model_name_or_path, "--engine", own.engine]
    command += ["--max_new_tokens", str(own.max_new_tokens), "--batch_size", str(own.solve_batch_size)]
    command += [] if own.test_samples is None else ["--max_samples", str(own.test_samples)]
    answers = math_scores.read_outputs(solve.main(command))
    seconds = round(time.monotonic() - began, 1)
    problems = problems_of(name, own)
    scores = math_scores.score(answers, problems, workers=os.cpu_count() or 1)
    del scores["listed"]  # score.py --list gives it again
    return scores | {"seconds": seconds, "fingerprint": solve.fingerprint(problems)}


def problems_of(name: str, own: argparse.Namespace) -> list[math_references.Problem]:
    """The problems of one set that are answered."""
    return spaced(math_references.read(getattr(own, name), name), own.test_samples)


def make_record(out: Path, trained: dict[str, Any], testing: dict[str, Any]) -> dict[str, Any]:
    """Everything there is to know of the run; no set is scored yet."""
    settings = trained["settings"]
    return {
        "experiment": "math",
        "model": settings["model_name_or_path"],
        "method": settings["method"],
        "seed": settings["seed"],
        **trained,
        "testing": testing,
        "scores": {},  # by set
        "bytes_on_disk": sum(p.stat().st_size for p in (out / "last").glob("*.safetensors")),
    }


def summary(record: dict[str, Any]) -> str:
    parts = [
        f"{name} {scores['rules']['authors']['accuracy']:.2f} by the authors' rule, "
        f"{scores['rules']['corrected']['accuracy']:.2f} corrected"
        for name, scores in record["scores"].items()
    ]
    return f"{record['method']}: {'; '.join(parts)}; {record['stored_parameters']['parameters']:,} stored parameters"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    commands.run(main, "run_math")
