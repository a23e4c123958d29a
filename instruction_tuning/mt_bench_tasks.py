"""What a judge is asked: FastChat's prompt for each turn of each answer, and which of them have no judgment yet."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mt_bench import (
    KNOWN_WRONG,
    REFERENCED,
    REFERENCES,
    Answer,
    Bench,
    Prompt,
    Question,
    read_answers,
    read_judgments,
)


class Task(NamedTuple):
    """One turn of one answer, and what the judge is asked about it."""

    question: Question
    model: str
    turn: int
    prompt: Prompt
    user_prompt: str

    @property
    def place(self) -> str:
        return f"{self.model}, question {self.question.question_id}, turn {self.turn}"

    def key(self, judge: str) -> tuple[str, str, int, int]:
        return (judge, self.model, self.question.question_id, self.turn)


def read_models(paths: list[Path]) -> dict[str, list[Answer]]:
    """The answers by model.

    Raises:
        ValueError: a file without answers, or two of one model.
    """
    models: dict[str, list[Answer]] = {}
    for path in paths:
        answers = read_answers(path)
        if not answers:
            raise ValueError(f"{path} holds no answers")
        if answers[0].model_id in models:
            raise ValueError(f"{path}: another file has answers of a model called {answers[0].model_id} too")
        models[answers[0].model_id] = answers
    return models


def make_tasks(bench: Bench, models: dict[str, list[Answer]], judge: str, turns: Iterable[int]) -> list[Task]:
    """All there is to judge, turn by turn and model by model.

    Raises:
        ValueError: an answer to no question of the benchmark, or one without a turn; or a reference is missing.
    """
    questions, prompts, (file, references) = bench.questions(), bench.prompts(), bench.references(judge)
    for model, answers in models.items():
        if len(answers) < len(questions):
            print(f"{model}: {len(answers)} of the {len(questions)} questions are answered; the rest are not judged")
    tasks = []
    for turn in sorted(set(turns)):
        for model, answers in models.items():
            for answer in answers:
                if (question := questions.get(answer.question_id)) is None:
                    raise ValueError(f"{model} answers question {answer.question_id}, which {bench.folder} has not")
                if turn > len(question.turns):
                    continue  # as FastChat does
                tasks.append(make_task(question, answer, turn, prompts, references.get(question.question_id), file))
    doubtful = {task.question.question_id for task in tasks} & KNOWN_WRONG
    if doubtful and file == bench.folder / REFERENCES:
        numbers = ", ".join(map(str, sorted(doubtful)))
        print(f"{file.name} is known to be wrong on {len(doubtful)} of these questions (FastChat #3158): {numbers}")
    return tasks


def make_task(
    question: Question,
    answer: Answer,
    turn: int,
    prompts: dict[str, Prompt],
    reference: list[str] | None,
    reference_file: Path,
) -> Task:
    """The prompt that FastChat would send: with the reference answers in three categories, and for turn 2 with both."""
    fields: dict[str, str] = {}
    name = "single-math-v1" if question.category in REFERENCED else "single-v1"
    if question.category in REFERENCED:
        if reference is None or len(reference) < turn:
            raise ValueError(f"{reference_file} has no answer to question {question.question_id}, turn {turn}")
        fields |= {f"ref_answer_{number}": text for number, text in enumerate(reference, 1)}
    if len(answer.turns) < turn:
        raise ValueError(f"{answer.model_id} has no answer to turn {turn} of question {question.question_id}")
    if turn == 1:
        fields |= {"question": question.turns[0], "answer": answer.turns[0]}
    else:
        name += "-multi-turn"
        fields |= {f"question_{number}": text for number, text in enumerate(question.turns, 1)}
        fields |= {f"answer_{number}": text for number, text in enumerate(answer.turns, 1)}
    try:
        text = prompts[name].template.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"the judge prompts have no {name}, or not with MT-Bench's fields: {error}") from error
    return Task(question, answer.model_id, turn, prompts[name], text)


def without_judgment(tasks: list[Task], judge: str, target: Path) -> list[Task]:
    """The tasks that the file of judgments, if there is one, has no judgment of.

    Raises:
        ValueError: a judgment is of another answer of a model with this name.
    """
    judged = read_judgments(target, unfinished=True) if target.exists() else []
    asked = {judgment.key: judgment.user_prompt for judgment in judged}
    for task in tasks:
        if asked.get(task.key(judge), task.user_prompt) != task.user_prompt:
            raise ValueError(
                f"{target} holds judgments of other answers of {task.model} (question {task.question.question_id}, "
                f"turn {task.turn}): remove them, or give another --output"
            )
    return [task for task in tasks if task.key(judge) not in asked]
