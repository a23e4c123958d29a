"""The benchmark's files: reading, writing, downloading."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mt_bench_helpers import QUESTIONS, answer_row, write_rows

import mt_bench
from mt_bench import Answer, Bench, append_line, file_name, mend_end, read_answers, read_judgments, write_lines
from vblora_experiments import progress

JUDGMENT = {
    "question_id": 81,
    "model": "vicuna",
    "judge": ["gpt-4", "single-v1"],
    "user_prompt": "Rate \u2028 this.",
    "judgment": "Fine. [[7]]",
    "score": 7,
    "turn": 1,
    "tstamp": 1686286924.8,
}


def test_the_small_benchmark_is_read(bench_dir):
    bench = Bench.of(bench_dir)
    questions = bench.questions()
    assert [question.turns for question in questions.values()] == [row["turns"] for row in QUESTIONS]
    assert [question.temperature for question in questions.values()] == [0.7, 0.0, 0.0, 0.1]
    file, references = bench.references("gpt-4")
    assert references == {n: [f"ref {n} one", f"ref {n} two"] for n in (104, 112)} and file.name == "gpt-4.jsonl"
    assert bench.prompts()["single-v1"].system == "system of single-v1"


def test_a_judge_with_references_of_its_own_gets_them(bench_dir):
    write_rows(bench_dir / "reference_answer" / "gpt-4-0125-preview.jsonl", [answer_row(104, "x", ["none", "one"])])
    bench = Bench.of(bench_dir)
    assert bench.references("gpt-4-0125-preview")[1] == {104: ["none", "one"]}
    assert len(bench.references("another")[1]) == 2


@pytest.mark.parametrize("given", [".", "data", "data/mt_bench"])
def test_fastchats_folders_are_found(given, bench_dir, tmp_path):
    folder = tmp_path / "llm_judge" / "data" / "mt_bench"
    shutil.copytree(bench_dir, folder)
    (folder / "judge_prompts.jsonl").rename(folder.parent / "judge_prompts.jsonl")
    bench = Bench.of(tmp_path / "llm_judge" / given)
    assert len(bench.questions()) == 4 and len(bench.prompts()) == 4 and len(bench.references("gpt-4")[1]) == 2


def test_the_real_benchmark(real_data):
    bench = Bench.of(real_data("mt_bench"))
    questions = bench.questions()
    assert list(questions) == list(range(81, 161))
    counts = dict.fromkeys(mt_bench.CATEGORIES, 0)
    for question in questions.values():
        counts[question.category] += 1
        assert len(question.turns) == 2
    assert set(counts.values()) == {10}
    references = bench.references("gpt-4")[1]
    assert {n for n, q in questions.items() if q.category in mt_bench.REFERENCED} == set(references)
    assert references.keys() > mt_bench.KNOWN_WRONG and len(mt_bench.KNOWN_WRONG) == 13
    assert {"single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn"} <= set(bench.prompts())
    for name, (_, digest) in mt_bench.FILES.items():
        assert hashlib.sha256((bench.folder / name).read_bytes()).hexdigest() == digest


def test_which_known_wrong_references_are_wrong_is_plain_in_two_cases(real_data):
    references = Bench.of(real_data("mt_bench")).references("gpt-4")[1]
    assert "Area = 0" in references[111][0]  # of (0, 0), (-1, 1), (3, 3) it is |-1 * 3 - 3 * 1| / 2 = 3
    assert "34/36" in references[114][0]  # of 36 rolls one, (1, 1), is below 3
    assert "is 0" in references[120][0] and "1.65" in references[120][1]  # f(2) = 0: the root is 2


# ------------------------------------------------------------------------------------------ answers, judgments


def test_answers_come_back_as_they_were_written_and_in_fastchats_fields(tmp_path):
    path = tmp_path / "m.jsonl"
    answers = [Answer(81, "id", "m", ["é \u2028 {x}\n", ""], 1.5), Answer(82, "id2", "m", ["a", "b"], 2.5)]
    write_lines(path, [answer.to_row() for answer in answers])
    assert read_answers(path) == answers
    first = json.loads(path.read_text().split("\n")[0])
    assert list(first) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert first["choices"] == [{"index": 0, "turns": ["é \u2028 {x}\n", ""]}]
    path.read_bytes().decode("ascii")  # FastChat opens it in whatever encoding the machine has


def test_fastchats_answers_are_read(tmp_path):
    row = {**answer_row(81, "vicuna", ["one", "two"]), "generate_params": {"temperature": 0.7}}
    row["choices"].append({"index": 1, "turns": ["not", "this"]})
    path = tmp_path / "vicuna.jsonl"
    later = answer_row(81, "vicuna", ["three", "four"])
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_answers(path)[0].turns == ["one", "two"]
    append_line(path, later)
    assert [answer.turns for answer in read_answers(path)] == [["three", "four"]]


def test_judgments_come_back_as_fastchat_wrote_them(tmp_path):
    path = write_rows(tmp_path / "gpt-4_single.jsonl", [JUDGMENT, {**JUDGMENT, "turn": 2, "score": -1}])
    judgments = read_judgments(path)
    assert [judgment.to_row() for judgment in judgments] == [
        json.loads(line) for line in path.read_text().split("\n")[:-1]
    ]
    assert list(judgments[0].to_row()) == list(JUDGMENT)
    assert judgments[0].key == ("gpt-4", "vicuna", 81, 1)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        (json.dumps({"category": "math", "turns": ["a"]}), "question_id must be int, and is missing"),
        (json.dumps({"question_id": True, "category": "math", "turns": ["a"]}), "question_id must be int"),
        (json.dumps({"question_id": 9, "category": "maths", "turns": ["a"]}), "'maths'"),
        (json.dumps({"question_id": 9, "category": "math", "turns": []}), "turns must be a list of texts"),
        (json.dumps(QUESTIONS[0]), "question 81 stands there twice"),
    ],
)
def test_a_malformed_question_is_named_by_file_and_line(line, message, bench_dir):
    with (bench_dir / "question.jsonl").open("a") as file:
        file.write("\n" + line + "\n")
    with pytest.raises(ValueError, match=r"question\.jsonl, line 6: ") as caught:
        Bench.of(bench_dir).questions()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score": "7"}, "score"),
        ({"score": True}, "score"),
        ({"turn": 3}, "turn"),
        ({"judge": []}, "judge"),
        ({"model": 1}, "model"),
        ({"model": [[]]}, "model must be str, not a list"),
        ({"score": float("nan")}, "score must be a number, not 'nan'"),
        ({"score": float("inf")}, "score"),
        ({"score": 10**400}, "score"),
        ({"tstamp": {}}, "tstamp must be a number, not a dict"),
    ],
)
def test_a_malformed_judgment_is_named_by_file_and_line(change, message, tmp_path):
    path = write_rows(tmp_path / "j.jsonl", [JUDGMENT, {**JUDGMENT, **change}])
    with pytest.raises(ValueError, match=rf"line 2: .*{message}"):
        read_judgments(path)


def test_malformed_answers_are_named_by_file_and_line(tmp_path):
    path = write_rows(
        tmp_path / "a.jsonl", [answer_row(81, "m", ["a"]), {**answer_row(82, "m", ["a"]), "choices": [1]}]
    )
    with pytest.raises(ValueError, match="line 2: choices"):
        read_answers(path)
    path = write_rows(tmp_path / "a.jsonl", [answer_row(81, "m", ["a"]), answer_row(82, "n", ["a"])])
    with pytest.raises(ValueError, match=r"line 2: .*several models, n among them"):
        read_answers(path)
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist"):
        read_answers(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "line",
    [b"[" * 10**5, b'{"question_id": ' + b"[" * 10**5, b'{"question_id": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"\0"],
)
def test_no_damaged_line_is_more_than_a_value_error(line, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    for read in (read_answers, read_judgments):
        with pytest.raises(ValueError, match=r"x\.jsonl, line 2: no JSON"):
            read(path)
    path.write_bytes(b"{}\n" + line)
    mend_end(path)
    assert path.read_bytes() == b"{}\n"


def test_nothing_of_a_line_stays_where_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(progress.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            append_line(path, {"a": 1})
        assert not path.exists()
    append_line(path, {"a": 1})
    with monkeypatch.context() as patched:
        patched.setattr(progress.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            append_line(path, {"a": 2})
    assert path.read_bytes() == b'{"a": 1}\n'


def test_a_file_ends_with_a_whole_line_after_mending(tmp_path):
    path = tmp_path / "x.jsonl"
    mend_end(path)
    assert not path.exists()
    for before, after in [
        (b"", b""),
        (b'{"a', b""),
        (b'{}\n{"a": "\xc3', b"{}\n"),
        (b"{}\n{}", b"{}\n{}\n"),
        (b"{}\n", b"{}\n"),
    ]:
        path.write_bytes(before)
        mend_end(path)
        assert path.read_bytes() == after
    append_line(path, {"a": 1})
    assert path.read_bytes() == b'{}\n{"a": 1}\n'


@pytest.mark.parametrize("name", ["", ".", "../up", "a\nb", "a\\b"])
def test_a_name_that_makes_no_file_is_refused(name):
    with pytest.raises(ValueError, match="cannot name a file"):
        file_name(name)


def test_a_name_of_the_hub_makes_a_file():
    assert file_name("meta-llama/Llama-2-7b") == "meta-llama--Llama-2-7b"


# ----------------------------------------------------------------------------------------------- download


@pytest.fixture
def source(bench_dir, tmp_path, monkeypatch):
    """A local server with the small benchmark as FastChat lays it out, and an empty cache; gives the served folder."""
    served = tmp_path / "served"
    shutil.copytree(bench_dir, served / "mt_bench")
    (served / "mt_bench" / "judge_prompts.jsonl").rename(served / "judge_prompts.jsonl")
    digests = {
        name: (place, hashlib.sha256((served / place).read_bytes()).hexdigest())
        for name, (place, _) in mt_bench.FILES.items()
    }
    seen = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            seen.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(mt_bench, "SOURCE", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(mt_bench, "FILES", digests)
    monkeypatch.setattr(mt_bench, "CACHE", tmp_path / "cache")
    yield served, seen
    server.shutdown()
    server.server_close()


def test_the_files_are_downloaded_once_and_mended(source, tmp_path):
    _, seen = source
    for _ in range(2):
        bench = Bench.of(None)
        assert bench.folder == tmp_path / "cache" and len(bench.questions()) == len(bench.prompts()) == 4
    assert seen == ["/mt_bench/question.jsonl", "/mt_bench/reference_answer/gpt-4.jsonl", "/judge_prompts.jsonl"]
    (bench.folder / "question.jsonl").write_text("damaged")
    assert len(Bench.of(None).questions()) == 4 and len(seen) == 4


def test_a_file_that_is_not_the_pinned_one_is_refused(source, tmp_path):
    served, _ = source
    (served / "judge_prompts.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"judge_prompts\.jsonl is not the file it should be: SHA-256"):
        Bench.of(None)
    assert not (tmp_path / "cache" / "judge_prompts.jsonl").exists()


def test_a_download_that_fails_says_what_to_do(source):
    served, _ = source
    (served / "mt_bench" / "question.jsonl").unlink()
    with pytest.raises(ValueError, match=r"404.*--bench_dir DIR"):
        Bench.of(None)


def test_the_addresses_are_those_of_the_pinned_commit():
    assert f"{mt_bench.SOURCE}/{mt_bench.FILES['question.jsonl'][0]}" == (
        "https://raw.githubusercontent.com/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d/"
        "fastchat/llm_judge/data/mt_bench/question.jsonl"
    )


def test_a_folder_without_questions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no question\.jsonl"):
        Bench.of(tmp_path)
