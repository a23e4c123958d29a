"""Judging, against an endpoint on this machine that fails as it is told."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import pytest
from mt_bench_helpers import (
    PROMPTS,
    JudgeServer,
    answer_row,
    cuts,
    cuts_in_the_middle,
    dawdles,
    fails,
    rate,
    says,
    sends,
    write_rows,
)

import judge_endpoint
import mt_bench_tasks
from judge_endpoint import masked, reply
from mt_bench import Bench, read_judgments
from mt_bench_judge import main, rating

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-secret-123"
NUMBERS = (81, 104, 112, 141)


@pytest.fixture
def server(monkeypatch):
    judge = JudgeServer()
    monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield judge
    judge.close()


@pytest.fixture
def answers(tmp_path):
    """The files of two models' answers to both turns."""
    return [
        write_rows(
            tmp_path / "data" / "model_answer" / f"{model}.jsonl",
            [answer_row(n, model, [f"{model} {n} {{one}}", f"{model} {n} two {'x' * n}"]) for n in NUMBERS],
        )
        for model in ("alpha", "beta")
    ]


@pytest.fixture
def command(answers, bench_dir):
    """A function from further flags to the arguments; waits are a millisecond."""

    def make(*more, files=answers):
        quick = ["--backoff", "0.001", "--timeout", "5", "--yes", "--bench_dir", str(bench_dir)]
        return [*map(str, files), *quick, *map(str, more)]

    return make


def outcome(path):
    """The judgments without their times, in an order of their own."""
    return sorted(json.dumps({**judgment.to_row(), "tstamp": 0}) for judgment in read_judgments(path))


@pytest.fixture
def expected(server, command, tmp_path):
    """What comes out when nothing fails; the server forgets it then."""
    wanted = outcome(main(command("--output", tmp_path / "undisturbed")))
    server.requests.clear()
    return wanted


# ------------------------------------------------------------------------------------------ what is asked


def test_both_turns_of_both_models_are_judged_with_fastchats_prompts(server, command, answers):
    path = main(command())
    assert path == answers[0].parents[1] / "model_judgment" / "gpt-4_single.jsonl"
    judgments = read_judgments(path)
    assert len(judgments) == len(server.requests) == 16
    assert {(j.model, j.question_id, j.turn) for j in judgments} == {
        (model, number, turn) for model in ("alpha", "beta") for number in NUMBERS for turn in (1, 2)
    }
    by_key = {(j.model, j.question_id, j.turn): j for j in judgments}
    one = by_key["alpha", 81, 1]
    assert one.user_prompt == "Rate.\n[Q]Write {a} line.[A]alpha 81 {one}" and one.judge == ["gpt-4", "single-v1"]
    assert by_key["beta", 112, 1].user_prompt == "Rate.\n[Q]1 + 1?[R]ref 112 one[A]beta 112 {one}"
    two = by_key["beta", 104, 2]
    assert two.user_prompt.startswith("Three sisters?|ref 104 one|Two?|ref 104 two|beta 104 {one}|beta 104 two x")
    assert two.judge == ["gpt-4", "single-math-v1-multi-turn"]
    assert by_key["alpha", 141, 2].judge == ["gpt-4", "single-v1-multi-turn"]
    assert all(j.score == 1 + len(j.user_prompt) % 10 for j in judgments)
    assert all(f"[[{j.score}]]" in j.judgment for j in judgments)


def test_the_request_is_fastchats(server, command):
    main(command("--turns", "1"))
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["headers"]["Authorization"] == f"Bearer {KEY}"
    body = request["body"]
    messages = body.pop("messages")
    assert body == {"model": "gpt-4", "temperature": 0, "max_tokens": 2048}
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[0]["content"] == "system of single-v1"
    assert len(server.requests) == 8


def test_an_endpoint_of_ones_own_needs_no_key(server, command, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    main(command("--turns", "2", "--judge", "org/judge"))
    assert "Authorization" not in server.requests[0]["headers"] and server.requests[0]["body"]["model"] == "org/judge"
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        main(command())


def test_the_prompts_of_the_real_benchmark(real_data, tmp_path, capsys):
    bench = Bench.of(real_data("mt_bench"))
    rows = [answer_row(number, "m", ["first {}", "second"]) for number in bench.questions()]
    answers = mt_bench_tasks.read_models([write_rows(tmp_path / "m.jsonl", rows)])
    tasks = mt_bench_tasks.make_tasks(bench, answers, "gpt-4", (1, 2))
    counts = {name: sum(task.prompt.name == name for task in tasks) for name in PROMPTS}
    assert list(counts.values()) == [50, 30, 50, 30]
    assert all("{" not in task.user_prompt.split("first {}")[0][:80] for task in tasks)
    texts = {(task.question.question_id, task.turn): task.user_prompt for task in tasks}
    assert "[The Start of Reference Answer]\nTo find the area of the triangle" in texts[111, 1]
    assert texts[111, 1].endswith("[The Start of Assistant's Answer]\nfirst {}\n[The End of Assistant's Answer]")
    assert "### Assistant A:\nsecond" in texts[111, 2] and "no circumscribed circle" in texts[111, 2]
    assert "wrong on 13 of these questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, score",
    [
        ("Rating: [[8]]", 8),
        ("Rating: [[7.5]]", 7.5),
        ("first [3], then [[9]]", 9),
        ("[[2]] and [[9]]", 9),
        ("Rating: [[8]]. A [[10]] would need more.", 8),
        ("**Final rating:** **[[8]]**, not [[9]]", 8),
        ('I must write "Rating: [[5]]" or so. Rating: [[8]]', 8),
        ("<think>First [[3]]? No.</think>\nRating: [[8]]", 8),
        ("<think>First [[3]]? Rather [[9]].</think>\nRating: 8", -1),
        ("First [[3]]? No.\n</think>\n\nRating: [[8]]", 8),
        ("<think>\nRating: [[3]]? It was cut off he", -1),
        ("Rating: [[8]]\n<reasoning>or [[3]]</reasoning>", 8),
        ("<thinking a='b'>[[3]] <think>[[4]]</thinking>Rating: [[8]]", 8),
        ("[THINK]Rating: [[3]][/THINK]Rating: [[8]]", 8),
        ("◁think▷[[3]]◁/think▷[[8]]", 8),
        ("<|channel|>analysis<|message|>[[3]]<|end|><|start|>assistant<|channel|>final<|message|>Rating: [[8]]", 8),
        ("It begins with <think> and ends nowhere. Rating: [[8]]", 8),
        ("Rating: [6]", 6),
        ("[[10]]", 10),
        ("[[08]]", 8),
        ("Rating: 8", -1),
        ("[[eight]]", -1),
        ("[[8/10]]", -1),
        ("", -1),
    ],
)
def test_the_rating_that_a_judgment_ends_with_is_found(text, score):
    assert rating(text) == score


# ---------------------------------------------------------------------------------------------- failures


FAILURES = {
    "429": fails(429),
    "429, come back": fails(429, headers=[("Retry-After", "0.05")]),
    "429, come back at no time": fails(429, headers=[("Retry-After", "soon")]),
    "500": fails(500),
    "503": sends(b"<html>down for a moment</html>", 503),
    "cut": cuts,
    "cut in the middle": cuts_in_the_middle,
    "no JSON": sends(b"<html>"),
    "another JSON": sends(b'{"choices": []}'),
    "a list": sends(b"[1]"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_passing_failure_changes_nothing(failure, server, command, expected):
    server.script = [rate, FAILURES[failure], FAILURES[failure], rate, FAILURES[failure]]
    assert outcome(main(command())) == expected
    assert len(server.requests) == 16 + 3


def test_a_slow_answer_is_asked_for_again(server, command, expected):
    server.script = [rate, dawdles(9.0)]
    assert outcome(main(command("--timeout", "3"))) == expected
    assert len(server.requests) == 17


def test_the_endpoint_says_how_long_to_wait(server, command):
    server.script = [fails(429, headers=[("Retry-After", "0.2")])]
    main(command("--turns", "1"))
    first, second = (request["at"] for request in server.requests[:2])
    assert second - first >= 0.19


def test_waits_double_up_to_a_limit(monkeypatch):
    waits = []
    endpoint = judge_endpoint.Endpoint("http://127.0.0.1:9", "", "j", tries=8, backoff=2.0)
    monkeypatch.setattr(endpoint, "_pause", lambda seconds: waits.append(seconds) if seconds > 0 else None)
    monkeypatch.setattr(judge_endpoint.random, "uniform", lambda low, high: high)
    for tried in range(8):
        endpoint._before(SimpleNamespace(headers={"x-stainless-retry-count": str(tried)}))
    assert [wait for wait in waits if wait > 1] == [2, 4, 8, 16, 32, 60, 60]


def test_nobody_there_is_said_after_so_many_tries():
    endpoint = judge_endpoint.Endpoint("http://user:word@127.0.0.1:9/v1?key=a", "", "j", tries=2, backoff=0)
    with pytest.raises(ValueError, match=r"^http://127.0.0.1:9/v1 did not answer in 2 tries: .*refused; the same"):
        endpoint.complete([])


def test_a_judgment_without_a_rating_is_asked_for_again(server, command, expected):
    server.script = [says("I like it."), says("Very much."), rate]
    assert outcome(main(command())) == expected and len(server.requests) == 18


def test_one_that_stays_without_a_rating_is_kept_and_listed(server, command, capsys):
    server.script = [says("I like it."), says(None), says("Rating: 8")]
    path = main(command("--turns", "1"))
    first, *rest = read_judgments(path)
    assert (first.score, first.judgment) == (-1, "Rating: 8") and all(judgment.score > 0 for judgment in rest)
    out = capsys.readouterr().out
    assert "no rating: alpha, question 81, turn 1" in out and "8 judgments, 1 of them without a rating" in out
    main(command("--turns", "1"))  # kept: not asked for again
    assert len(server.requests) == 10


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_ends_it_at_once_and_never_shows_the_key(status, server, command, answers):
    server.script = [rate, fails(status, f"Incorrect API key\nprovided: {KEY}.")]
    with pytest.raises(ValueError, match=rf"refuses: {status} .*Incorrect API key provided: \*\*\*\.$") as caught:
        main(command())
    assert KEY not in str(caught.value) and len(server.requests) == 2
    assert len(read_judgments(answers[0].parents[1] / "model_judgment" / "gpt-4_single.jsonl")) == 1


def test_an_empty_account_is_no_rate_limit(server, command):
    server.script = [sends(b'{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}', 429)]
    with pytest.raises(ValueError, match=r"429 .*exceeded your quota"):
        main(command())
    assert len(server.requests) == 1


def test_an_endpoint_that_wants_an_hour_is_left_alone(server, command):
    server.script = [fails(429, "tomorrow", [("Retry-After", "3600")])]
    with pytest.raises(ValueError, match=r"tomorrow \(it asks to wait: 3600\)"):
        main(command())
    assert len(server.requests) == 1


def test_a_redirection_is_not_followed_with_the_key(server, command):
    elsewhere = JudgeServer()
    server.script = [fails(302, "moved", [("Location", f"{elsewhere.url}/chat/completions")])]
    with pytest.raises(ValueError, match=f"302 .* to {elsewhere.url}.*OPENAI_BASE_URL"):
        main(command())
    assert not elsewhere.requests
    elsewhere.close()


# ------------------------------------------------------------------------------- what a model does not take

TAKES_NO_LIMIT = {
    "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'.",
    "param": "max_tokens",
    "code": "unsupported_parameter",
}
TAKES_NO_TEMPERATURE = {
    "message": "Unsupported value: 'temperature' does not support 0 with this model. Only the default is supported.",
    "param": "temperature",
    "code": "unsupported_value",
}


def refusing(server, **refusals):
    """Has the server refuse each request that has one of these parameters."""
    original = server.answer

    def answer(handler, prompt, body):
        error = next((error for name, error in refusals.items() if name in body), None)
        if error is None:
            return original(handler, prompt, body)
        handler.send(400, json.dumps({"error": error}).encode())

    server.answer = answer


@pytest.mark.parametrize("workers", [1, 4])
def test_a_parameter_that_a_model_refuses_is_not_sent_again(workers, server, command, expected, capsys):
    refusing(server, max_tokens=TAKES_NO_LIMIT, temperature=TAKES_NO_TEMPERATURE)
    assert outcome(main(command("--workers", workers, "--max_tokens", "5000"))) == expected
    bodies = [request["body"] for request in server.requests]
    assert 18 <= len(bodies) <= 16 + 2 * workers
    taken = [{k: v for k, v in body.items() if k not in ("model", "messages")} for body in bodies]
    assert taken[0] == {"temperature": 0, "max_tokens": 5000} and taken[-1] == {"max_completion_tokens": 5000}
    said = capsys.readouterr().err
    assert said.count("gpt-4 does not take max_tokens=5000") == said.count("gpt-4 does not take temperature=0") == 1


def test_a_model_may_take_no_limit_at_all(server, command, expected):
    unknown = {"message": "Unrecognized request argument supplied: max_completion_tokens"}
    refusing(server, max_tokens=TAKES_NO_LIMIT, max_completion_tokens=unknown)
    assert outcome(main(command())) == expected
    assert set(server.requests[-1]["body"]) == {"model", "messages", "temperature"}


# ------------------------------------------------------------------------------------- prompts that are refused

TOO_LONG = "This model's maximum context length is 8192 tokens, but max_tokens asks for 2048 more. Unsupported length."
REFUSALS = {
    "content filter": fails(400, "The response was filtered due to our content management policy."),
    "too long": fails(400, TOO_LONG),
    "too large": sends(b"<html>Request Entity Too Large</html>", 413),
    "not valid": fails(422, "messages: string too long"),
    "flagged": fails(403, "Your chosen model requires moderation and your input was flagged"),
    "of the account's words": fails(400, "Filtered: the prompt speaks of a billing quota"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_prompt_is_one_missing_judgment(refusal, server, command, expected, capsys):
    server.script = [rate, REFUSALS[refusal], rate, REFUSALS[refusal]]
    path = main(command())
    assert len(read_judgments(path)) == 14 and len(server.requests) == 16
    assert set(outcome(path)) < set(expected)
    out = capsys.readouterr().out
    assert "no judgment: alpha, question 104, turn 1: 4" in out and "no judgment: alpha, question 141, turn 1: 4" in out
    assert "14 judgments, 0 of them without a rating" in out and "2 judgments are missing" in out
    assert outcome(main(command())) == expected and len(server.requests) == 18


def test_when_the_first_ten_are_refused_it_is_not_the_prompts(server, command, answers):
    server.script = [fails(400, "no such thing")] * 16
    with pytest.raises(ValueError, match="refuses the first 10 prompts: 400 Bad Request: no such thing"):
        main(command())
    assert len(server.requests) == 10


def test_a_judge_that_answers_in_parts_is_read(server, command):
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "[[3]]"}]},
        {"type": "reasoning", "text": "Rating: [[2]]"},
        {"type": "text", "text": "Good. Rating: [["},
        {"type": "text", "text": "7]]"},
    ]
    server.script = [says(parts)] * 8
    judgments = read_judgments(main(command("--turns", "1")))
    assert {(judgment.score, judgment.judgment) for judgment in judgments} == {(7, "Good. Rating: [[7]]")}
    assert len(server.requests) == 8


@pytest.mark.parametrize(
    "message, text",
    [
        ({"content": ["a", "b"]}, "ab"),
        ({"content": {"type": "text", "text": "a"}}, "a"),
        ({"content": [{"type": "text", "text": {"value": "a", "annotations": []}}]}, "a"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}, {"text": "a"}, 5, None]}, "a"),
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"content": [{"type": "refusal", "refusal": "I cannot."}]}, "I cannot."),
        ({"content": None}, ""),
        ({}, ""),
    ],
)
def test_the_text_of_a_reply(message, text):
    assert reply(json.dumps({"choices": [{"message": message}]}).encode()) == text


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"{}", b'{"choices": [{"message": "a"}]}', b"[" * 100000])
def test_what_is_no_reply(content):
    with pytest.raises(ValueError, match="no chat completion"):
        reply(content)


# ------------------------------------------------------------------------------------------------- the key

LONG = "sk-pröj/AbCd+1234567=890".replace("ö", "o")
FORMS = {
    "plain": LONG,
    "folded": LONG.upper(),
    "cut off": LONG[:12],
    "in an address": urllib.parse.quote(LONG, safe=""),
    "in Base64": base64.b64encode(LONG.encode()).decode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_key_is_masked_in_every_form(form):
    shown = masked(f"Bearer {FORMS[form]}, and more", LONG)
    assert shown.startswith("Bearer ***") and shown.endswith(", and more")
    assert not any(FORMS[form][at : at + 8] in shown for at in range(len(FORMS[form]) - 7))


def test_a_short_key_garbles_no_words():
    assert masked("a broken token, not taken: ken.", "ken") == "a broken token, not taken: ***."
    assert masked("ken", "ken", words=False) == "ken" and masked("a text", "") == "a text"


ECHOES = {
    "redirect": fails(302, "moved", [("Location", f"https://elsewhere/?key={KEY}")]),
    "refusal": fails(401, f"who is {KEY}"),
    "page": sends(f"<html>{'x' * 70} Authorization: Bearer {KEY}".encode()),
    "page that is cut": sends(f"{'x' * 460}{KEY}".encode(), 500),
}


@pytest.mark.parametrize("echo", ECHOES)
def test_an_endpoint_that_echoes_the_key_does_not_show_it(echo, server, command, capsys):
    server.script = [ECHOES[echo]] * 2
    with pytest.raises(ValueError) as caught:
        main(command("--tries", "2"))
    shown = "".join(capsys.readouterr()) + str(caught.value)
    assert KEY[:8] not in shown and "***" in shown


def test_a_judgment_that_echoes_the_key_is_kept_without_it(server, command):
    server.script = [says(f"You sent {KEY}. Rating: [[7]]")]
    path = main(command())
    assert read_judgments(path)[0].judgment == "You sent ***. Rating: [[7]]" and KEY not in path.read_text()


def test_a_key_that_is_a_number_leaves_the_ratings_alone(server, command, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "7")
    server.script = [says("Rating: [[7]]")] * 8
    assert {judgment.score for judgment in read_judgments(main(command("--turns", "1")))} == {7}


def test_without_the_client_the_way_out_is_named(server, command, monkeypatch):
    monkeypatch.setattr(judge_endpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install openai"):
        main(command())
    main([*command(), "--plan"])


# ------------------------------------------------------------------------------------------ two at once


def test_two_commands_at_once_pay_once(server, command, expected, answers):
    server.hold = 0.02
    script = str(ROOT / "instruction_tuning" / "mt_bench_judge.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    calls = [command(), command(), command("--turns", "2", files=answers[1:])]
    started = [
        subprocess.Popen(
            [sys.executable, script, *call], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for call in calls
    ]
    ended = [(process.communicate(), process.returncode) for process in started]
    assert [code for _, code in ended] == [0, 0, 0], ended
    path = answers[0].parents[1] / "model_judgment" / "gpt-4_single.jsonl"
    assert outcome(path) == expected and len(server.requests) == 16
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_plan_reads_a_file_that_is_being_written(server, command, capsys):
    path = main(command())
    with path.open("a") as file:
        file.write('{"question_id": 8')
    before = path.read_bytes()
    main([*command(), "--plan"])
    assert "16 of 16 judgments are there already" in capsys.readouterr().out and path.read_bytes() == before


def test_it_gives_up_after_so_many_tries_and_goes_on_later(server, command, expected):
    server.script = [rate, rate] + [fails(500, "broken")] * 3
    with pytest.raises(ValueError, match=r"did not answer in 3 tries: 500 .*broken; the same command goes on"):
        main(command("--tries", "3"))
    assert len(server.requests) == 5
    assert outcome(main(command())) == expected
    assert len(server.requests) == 5 + 14


@pytest.mark.parametrize("workers", [1, 4])
def test_interrupted_at_any_point_it_ends_the_same(workers, server, command, expected, answers):
    path = answers[0].parents[1] / "model_judgment" / "gpt-4_single.jsonl"
    server.script = [rate] * 5 + [fails(401)]
    with pytest.raises(ValueError, match="401"):
        main(command("--workers", workers))
    kept = len(read_judgments(path))
    assert 5 <= kept < 16 and len(server.requests) == kept + 1  # nothing that was answered is lost
    with path.open("a") as file:
        file.write('{"question_id": 8')  # as after a power cut
    assert outcome(main(command("--workers", workers))) == expected
    assert len(server.requests) == 16 + 1


def test_a_second_command_asks_for_nothing(server, command, capsys):
    path = main(command())
    before = path.read_bytes()
    main(command())
    assert path.read_bytes() == before and len(server.requests) == 16
    assert "16 of 16 judgments are there already" in capsys.readouterr().out


def test_turns_and_models_add_to_one_file(server, command, answers, expected):
    main(command("--turns", "2", files=answers[1:]))
    main(command("--turns", "1", files=answers[1:]))
    assert outcome(main(command())) == expected and len(server.requests) == 16


# ------------------------------------------------------------------------------------- workers and limits


def test_workers_ask_at_the_same_time_and_get_the_same(server, command, expected):
    server.hold = 0.05
    server.script = [rate, fails(500), cuts, fails(429)]
    assert outcome(main(command("--workers", "4"))) == expected
    assert 2 <= max(request["under_way"] for request in server.requests) <= 4


def test_one_worker_asks_one_at_a_time(server, command):
    server.hold = 0.01
    main(command("--turns", "1"))
    assert {request["under_way"] for request in server.requests} == {1}


def test_requests_start_at_the_pace_given_tries_included(server, command, monkeypatch):
    waits = []
    monkeypatch.setattr(judge_endpoint.Endpoint, "_pause", lambda self, seconds: waits.append(round(seconds, 6)))
    monkeypatch.setattr(judge_endpoint.time, "monotonic", lambda: 1000.0)  # all at once
    server.script = [fails(500)]
    main(command("--workers", "4", "--requests_per_minute", "30", "--turns", "1", "--backoff", "0"))
    assert sorted(waits) == [0, 0, 2, 4, 6, 8, 10, 12, 14, 16]  # nine requests, and the pause after the failure


# ----------------------------------------------------------------------------------------- the estimate


def test_the_plan_asks_nothing(server, command, capsys, bench_dir, answers):
    main([*command("--price_in", "30", "--price_out", "60"), "--plan"])
    assert not server.requests
    out = " ".join(capsys.readouterr().out.split())
    tasks = mt_bench_tasks.make_tasks(Bench.of(bench_dir), mt_bench_tasks.read_models(answers), "gpt-4", (1, 2))
    tokens = sum(len(task.user_prompt) + len(task.prompt.system) for task in tasks) // 4
    assert f"16 requests to gpt-4 at {server.url}" in out and f"{tokens:,} tokens of prompts" in out
    price = (tokens * 30 + 16 * 250 * 60) / 1e6
    assert "4,000 of judgments" in out and "an estimate" in out and f"${price:.2f}" in out
    main(command())
    capsys.readouterr()
    main([*command(), "--plan"])
    assert "requests to" not in capsys.readouterr().out


def test_without_a_yes_nothing_is_sent(server, command, monkeypatch, capsys):
    arguments = [argument for argument in command() if argument != "--yes"]
    with pytest.raises(ValueError, match="add --yes"):
        main(arguments)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(ValueError, match="nothing has been sent"):
        main(arguments)
    assert not server.requests and "16 requests" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda question: "y")
    main(arguments)
    assert len(server.requests) == 16


# ----------------------------------------------------------------------------------------- wrong input


def test_judgments_of_other_answers_are_not_taken_for_these(server, command, answers):
    main(command())
    write_rows(answers[0], [answer_row(n, "alpha", ["changed", "changed"]) for n in NUMBERS])
    with pytest.raises(ValueError, match=r"other answers of alpha \(question 81, turn 1\): remove them, or"):
        main(command())


def test_answers_that_do_not_fit_are_named(server, command, answers, tmp_path, bench_dir, capsys):
    few = write_rows(tmp_path / "few.jsonl", [answer_row(81, "few", ["a"])])
    with pytest.raises(ValueError, match="say with --output"):
        main(command(files=[few]))
    with pytest.raises(ValueError, match="few has no answer to turn 2 of question 81"):
        main(command("--output", tmp_path / "o", files=[few]))
    main(command("--output", tmp_path / "o", "--turns", "1", files=[few]))
    assert "few: 1 of the 4 questions are answered" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another file has answers of a model called few too"):
        main(command("--output", tmp_path / "o", files=[few, few]))
    other = write_rows(tmp_path / "other.jsonl", [answer_row(7, "other", ["a", "b"])])
    with pytest.raises(ValueError, match="other answers question 7"):
        main(command("--output", tmp_path / "o", files=[other]))
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="holds no answers"):
        main(command("--output", tmp_path / "o", files=[empty]))
    write_rows(bench_dir / "reference_answer" / "gpt-4.jsonl", [answer_row(104, "gpt-4", ["a"])])
    with pytest.raises(ValueError, match=r"gpt-4\.jsonl has no answer to question 112, turn 1"):
        main(command())
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--workers", "0"], "--workers must be at least 1"),
        (["--requests_per_minute", "0"], "--requests_per_minute must be above 0"),
        (["--timeout", "nan"], "--timeout must be above 0"),
        (["--price_in", "1"], "go together"),
        (["--turns", "3"], "invalid choice"),
        (["--judge", ""], "cannot name a file"),
    ],
)
def test_wrong_flags_are_named(flags, message, server, command):
    with pytest.raises(ValueError, match=message):
        main(command(*flags))


def test_wrong_addresses_and_keys_are_named(server, command, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters"):
        main(command())
    monkeypatch.setenv("OPENAI_BASE_URL", "file:///etc")
    with pytest.raises(ValueError, match="OPENAI_BASE_URL must begin with http"):
        main(command())


def test_as_a_command_a_refusal_is_one_line_and_exit_code_2(server, command):
    server.script = [fails(401, f"bad key {KEY}")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "instruction_tuning" / "mt_bench_judge.py"), *command()],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("mt_bench_judge: error: ") and "bad key ***" in done.stderr
    assert KEY not in done.stdout + done.stderr
