"""One run of Table 3: train a row, answer MT-Bench, have the answers judged, and write a record.

    python instruction_tuning/run_instruct.py --row llama2_7b/vblora --seed 0
    export OPENAI_API_KEY=...
    python instruction_tuning/run_instruct.py --row llama2_7b/vblora --seed 0 --judge gpt-4

Takes the flags of finetune.py and those below; flags after --row override the row. Judging costs money and is done only
where --judge names the judge; a second call with it adds the scores to a record without. The output folder receives
what finetune.py writes, the answers and judgments in mt_bench/, and record.json.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import finetune
import mt_bench
import mt_bench_answer
import mt_bench_judge
import mt_bench_report
from vblora_experiments import commands, instruct, publishing, runs, training_run
from vblora_experiments.instruct import Run


@dataclass
class BenchArguments:
    """How MT-Bench is answered and judged."""

    bench_dir: str | None = field(
        default=None, metadata={"help": "folder with MT-Bench's files; downloaded once unless given"}
    )
    max_questions: int | None = field(
        default=None, metadata={"help": "answer this many questions, evenly spaced over the categories"}
    )
    max_new_tokens: int = field(default=1024, metadata={"help": "tokens of an answer at most"})
    judge: str | None = field(
        default=None, metadata={"help": "the judging model's name at the endpoint, such as gpt-4; nobody unless given"}
    )
    judge_workers: int = field(default=1, metadata={"help": "requests under way at a time"})


SCRIPT = finetune.FOLDER.script("run_instruct.py", BenchArguments, description=str(__doc__))


def main(arguments: list[str]) -> dict[str, Any]:
    """Run, and return the record; with --plan print and return what finetune.py estimates."""
    one = parse(arguments)
    return instruct.planned(one) if one.settings.show() else run(one)


def parse(arguments: list[str]) -> Run:
    """The settings of a command line, checked."""
    one = Run(SCRIPT.read(arguments))
    commands.check_least(one.settings.of(BenchArguments), max_questions=1, max_new_tokens=1, judge_workers=1)
    return one


def run(one: Run) -> dict[str, Any]:
    """Train, answer and judge, as far as that is not done; the record."""
    own, out = one.settings.of(BenchArguments), one.settings.output_dir
    bench = mt_bench.Bench.of(folder_of(own))  # before the training: a wrong folder would be found hours later
    bench.questions()
    if own.judge is not None:
        mt_bench_judge.endpoint_of(judging(out, own))
    trained = instruct.train(one)
    if not trained:  # another process of this run writes
        return {}
    testing = {"max_questions": own.max_questions, "max_new_tokens": own.max_new_tokens}
    record = training_run.record_of(
        one.settings, "testing", testing, lambda: make_record(out, trained, testing, answer(out, one, own))
    )
    runs.finish(out, record)  # the judge may fail
    if own.judge is not None and own.judge not in record["scores"]:
        record["scores"][own.judge] = judge(out, own, bench)
    runs.finish(out, record)
    print(summary(record))
    return publishing.published(one.training, record)


def folder_of(own: BenchArguments) -> Path | None:
    return None if own.bench_dir is None else Path(own.bench_dir)


def answers_of(out: Path) -> Path:
    """The run's file of answers, which is called as its folder is."""
    return mt_bench.answers_file(out / "mt_bench", out.resolve().name)


def answer(out: Path, one: Run, own: BenchArguments) -> float:
    """Answer the questions; the seconds that it took."""
    began = time.monotonic()
    mt_bench_answer.answer_questions(
        mt_bench_answer.Options(
            str(out),
            out.resolve().name,
            out / "mt_bench",
            model_name_or_path=one.instruct.model_name_or_path,
            bench_dir=folder_of(own),
            max_new_tokens=own.max_new_tokens,
            max_questions=own.max_questions,
        )
    )
    return round(time.monotonic() - began, 1)


def judging(out: Path, own: BenchArguments) -> mt_bench_judge.Options:
    """How the answers are judged."""
    assert own.judge is not None
    folder, workers = folder_of(own), own.judge_workers
    return mt_bench_judge.Options([answers_of(out)], judge=own.judge, bench_dir=folder, yes=True, workers=workers)


def judge(out: Path, own: BenchArguments, bench: mt_bench.Bench) -> dict[str, Any]:
    """Have the answers judged; the mean ratings, by turn."""
    judgments = mt_bench.read_judgments(mt_bench_judge.judge_answers(judging(out, own)))
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
    return {
        **training_run.heading("instruct", trained),
        "testing": testing,
        "answers": len(mt_bench.read_answers(answers_of(out))),
        "answer_seconds": seconds,
        "scores": {},  # by judge
        "bytes_on_disk": training_run.bytes_on_disk(out),
    }


def summary(record: dict[str, Any]) -> str:
    judged = [f"{scores['turn1']:.2f} by {judge}" for judge, scores in record["scores"].items() if scores["turn1"]]
    return (
        f"{record['method']}: MT-Bench, turn 1: {', '.join(judged) or 'not judged'}; {record['answers']} questions "
        f"answered; {record['stored_parameters']['parameters']:,} stored parameters"
    )


if __name__ == "__main__":
    commands.run(main, "run_instruct")
