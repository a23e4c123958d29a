"""One run of Table 3: train a row, answer MT-Bench, have the answers judged, and write a record.

    python instruction_tuning/run_instruct.py --row llama2_7b/vblora --seed 0
    export OPENAI_API_KEY=...
    python instruction_tuning/run_instruct.py --row llama2_7b/vblora --seed 0 --judge gpt-4

Takes the flags of finetune.py and those below; flags after --row override the row. Judging costs money and is done only
where --judge names the judge; a second call with it adds the scores to a record without. The output folder receives
what finetune.py writes, the answers and judgments in mt_bench/, and record.json.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import finetune
import mt_bench
import mt_bench_answer
import mt_bench_judge
import mt_bench_report
from instruct_rows import row
from vblora_experiments import commands, instruct, runs
from vblora_experiments.arguments import with_row
from vblora_experiments.instruct import Run


def main(arguments: list[str]) -> dict[str, Any]:
    """Run, and return the record; with --plan what finetune.py returns."""
    own, rest = parse(arguments)
    run = instruct.parse(rest, finetune.FOLDER)
    if run.instruct.plan:
        return finetune.main(rest)
    out = Path(str(run.training.output_dir))
    bench = mt_bench.Bench.of(own.bench_dir)  # before the training: a wrong folder would be found hours later
    bench.questions()
    if own.judge is not None:
        mt_bench_judge.Endpoint.from_environment(mt_bench_judge.parse(judging(out, own)))
    trained = finetune.main([*rest, "--output_dir", str(out)])
    if not trained:  # another process of this run writes
        return {}
    testing = {"max_questions": own.max_questions, "max_new_tokens": own.max_new_tokens}
    record = runs.finished(out, "testing", testing)
    if record is None:
        record = make_record(out, trained, testing, answer(out, run, own))
        record |= {"row": own.row, "overrides": runs.overrides(arguments)}
        runs.finish(out, record)
    if own.judge is not None and own.judge not in record["scores"]:
        record["scores"][own.judge] = judge(out, own, bench)
    runs.finish(out, record)
    print(summary(record))
    return record


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's own flags, and finetune.py's."""
    arguments = with_row(arguments, row)
    parser = commands.one_line_errors(
        argparse.ArgumentParser(
            prog="run_instruct.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.allow_abbrev = False
    parser.add_argument("--row", help="MODEL/METHOD: take the flags of this row of instruct_rows.py")
    parser.add_argument("--bench_dir", type=Path, help="folder with MT-Bench's files; downloaded once unless given")
    parser.add_argument(
        "--max_questions", type=int, help="answer this many questions, evenly spaced over the categories"
    )
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="tokens of an answer at most")
    parser.add_argument("--judge", help="the judging model's name at the endpoint, such as gpt-4; nobody unless given")
    parser.add_argument("--judge_workers", type=int, default=1, help="requests under way at a time")
    own, rest = parser.parse_known_args(arguments)
    for name in ("max_questions", "max_new_tokens", "judge_workers"):
        if (value := getattr(own, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    return own, rest


def answers_of(out: Path) -> Path:
    """The run's file of answers, which is called as its folder is."""
    return mt_bench.answers_file(out / "mt_bench", out.resolve().name)


def answer(out: Path, run: Run, own: argparse.Namespace) -> float:
    """Answer the questions; the seconds that it took."""
    began = time.monotonic()
    command = [str(out), "--model_id", out.resolve().name, "--output", str(out / "mt_bench")]
    command += ["--model_name_or_path", run.instruct.model_name_or_path, "--max_new_tokens", str(own.max_new_tokens)]
    command += ["--bench_dir", str(own.bench_dir)] if own.bench_dir else []
    command += ["--max_questions", str(own.max_questions)] if own.max_questions else []
    mt_bench_answer.main(command)
    return round(time.monotonic() - began, 1)


def judging(out: Path, own: argparse.Namespace) -> list[str]:
    """The arguments of mt_bench_judge.py."""
    command = [str(answers_of(out)), "--judge", own.judge, "--yes", "--workers", str(own.judge_workers)]
    return command + (["--bench_dir", str(own.bench_dir)] if own.bench_dir else [])


def judge(out: Path, own: argparse.Namespace, bench: mt_bench.Bench) -> dict[str, Any]:
    """Have the answers judged; the mean ratings, by turn."""
    judgments = mt_bench.read_judgments(mt_bench_judge.main(judging(out, own)))
    answers = mt_bench.read_answers(answers_of(out))
    scores: dict[str, Any] = {}
    for turn in (1, 2):
        members = [j for j in judgments if j.turn == turn]
        sound = [j for j in members if j.question_id not in mt_bench.KNOWN_WRONG]
        scores[f"turn{turn}"] = mt_bench_report.mean(members)
        scores[f"turn{turn}_sound"] = mt_bench_report.mean(sound)
        scores[f"turn{turn}_unrated"] = sum(j.score == mt_bench.UNRATED for j in members)
        asked = {answer.question_id for answer in answers if len(answer.turns) >= turn}
        scores[f"turn{turn}_missing"] = len(asked - {j.question_id for j in members})  # their prompts were refused
    categories = {number: question.category for number, question in bench.questions().items()}
    for category in mt_bench.CATEGORIES:
        first = [j for j in judgments if j.turn == 1 and categories[j.question_id] == category]
        scores[category] = mt_bench_report.mean(first)
    return scores


def make_record(out: Path, trained: dict[str, Any], testing: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Everything there is to know of the run; nobody has judged it yet."""
    settings = trained["settings"]
    return {
        "experiment": "instruct",
        "model": settings["model_name_or_path"],
        "method": settings["method"],
        "seed": settings["seed"],
        **trained,
        "testing": testing,
        "answers": len(mt_bench.read_answers(answers_of(out))),
        "answer_seconds": seconds,
        "scores": {},  # by judge
        "bytes_on_disk": sum(p.stat().st_size for p in (out / "last").glob("*.safetensors")),
    }


def summary(record: dict[str, Any]) -> str:
    judged = [f"{scores['turn1']:.2f} by {judge}" for judge, scores in record["scores"].items() if scores["turn1"]]
    return (
        f"{record['method']}: MT-Bench, turn 1: {', '.join(judged) or 'not judged'}; {record['answers']} questions "
        f"answered; {record['stored_parameters']['parameters']:,} stored parameters"
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    commands.run(main, "run_instruct")
