"""vblora serve: every answer is the one that the adapter gives alone, and nothing from outside does harm."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from language_helpers import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

import vblora
from vblora import cli
from vblora.serving import server
from vblora.serving.batcher import Batcher, Full, Stopped, Text, choose
from vblora.serving.classifier import Classifier, NoTokens

TEXTS = ["a good film", "", "not a good film at all, and far too long for most", "nul \0 and ü and \U0001f600"]


def config(r, targets, **more):
    return vblora.VBLoRAConfig(
        r=r, num_vectors=11, vector_length=16, init_vector_bank_bound=0.5, target_modules=targets, **more
    )


CONFIGS = {
    "alice": config(4, ["query", "value"], modules_to_save=["classifier"]),
    "bob": config(2, ["query", "key"], modules_to_save=["pooler", "classifier"]),
    "carol": config(1, ["dense"], modules_to_save=["classifier"]),
}


def special_tokens():
    tokenizer = byte_tokenizer()
    around = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B:1 </s>:1", "special_tokens": [("<s>", 0), ("</s>", 1)]}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**around)
    return tokenizer


LABELS = {"carol": 2, "dave": 2}  # the others have three


def load(folder, name=None):
    labels = LABELS.get(name, 3)
    return AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=labels).eval()


def write(folder, name, of=None, seed=0):
    adapter = vblora.attach(load(folder, name), CONFIGS[of or name], seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in [*adapter.parameters(), *(p for m in adapter.saved.values() for p in m.parameters())]:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    temporary = folder / f"{name}.new"
    adapter.pack(temporary)
    temporary.replace(folder / "adapters" / f"{name}.vblora.safetensors")


def alone(folder, name, text, text_pair=None):
    """The logits that this adapter gives by itself."""
    model = load(folder, name)
    vblora.load(model, folder / "adapters" / f"{name}.vblora.safetensors")
    with torch.no_grad():
        return model(**special_tokens()(text, text_pair, return_tensors="pt")).logits[0].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder without a head, and three adapters with theirs."""
    folder = tmp_path_factory.mktemp("serve")
    tokenizer = special_tokens()
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    settings = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, type_vocab_size=2, **size)
    BertModel(settings).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "adapters").mkdir()
    for number, name in enumerate(CONFIGS):
        write(folder, name, seed=number)
    return folder


@contextlib.contextmanager
def serving(load_it, **limits):
    """A running server: its port, its service and uvicorn's server."""
    service = server.Service(load_it, server.Limits(**limits))
    running = server.make_server(service)
    with server.listening("127.0.0.1", 0) as listener:
        service.start().join()
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1], service, running
        finally:
            running.should_exit = True
            thread.join()


def call(port, body=None, path="/classify", headers=None, chunked=False):
    """The status, and the answer as JSON where it is that."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        method = "GET" if body is None else "POST"
        connection.request(method, path, body, headers or {}, encode_chunked=chunked)
        answer = connection.getresponse()
        content = answer.read()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(content) if is_json else content.decode()
    finally:
        connection.close()


def ask(port, *rows):
    names = ("adapter", "text", "text_pair")
    return call(port, json.dumps({"inputs": [dict(zip(names, row, strict=False)) for row in rows]}))


# --- the real classifier --------------------------------------------------------------------------------------------


def test_every_text_is_answered_as_its_adapter_alone_would(folder):
    asked = [(name, text) for name in CONFIGS for text in TEXTS] + [("alice", "a pair", "of texts")]
    expected = [alone(folder, *row) for row in asked]
    with serving(lambda: Classifier.load(str(folder / "model"), folder / "adapters"), rows=5) as (port, _, _):
        status, whole = ask(port, *asked)
        with ThreadPoolExecutor(8) as pool:
            single = list(pool.map(lambda row: ask(port, row), asked * 3))
        metrics = call(port, path="/metrics")[1]
    assert status == 200 and {one[0] for one in single} == {200}
    for answers in (whole["outputs"], [one[1]["outputs"][0] for one in single]):
        for answer, logits in zip(answers, expected * (len(answers) // len(expected)), strict=True):
            torch.testing.assert_close(torch.tensor(answer["logits"]), torch.tensor(logits), rtol=1e-4, atol=1e-5)
            assert answer["label"] == max(range(len(logits)), key=logits.__getitem__)
    assert f'vblora_requests_total{{status="200"}} {1 + len(single)}.0' in metrics
    assert f"vblora_batch_rows_sum {4 * len(asked)}.0" in metrics and "vblora_adapters 3.0" in metrics


def test_adapters_come_are_replaced_broken_and_go_while_it_runs(folder, monkeypatch):
    monkeypatch.setattr(server, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr("vblora.serving.classifier.REFUSED_FOR", 1000)
    file = folder / "adapters" / "dave.vblora.safetensors"

    def until(status, *row):
        for _ in range(500):
            found = ask(port, row)
            if found[0] == status:
                return found[1]
            time.sleep(0.02)
        raise AssertionError(f"{found} after ten seconds")

    with serving(lambda: Classifier.load(str(folder / "model"), folder / "adapters")) as (port, _, _):
        assert ask(port, ("dave", "a text")) == (404, {"detail": "there is no adapter 'dave'"})
        for of, seed in (("carol", 7), ("bob", 8)):  # the second replaces the first
            write(folder, "dave", of, seed)
            until(200, "dave", "a text")
            found = torch.tensor(ask(port, ("dave", "a text"))[1]["outputs"][0]["logits"])
            torch.testing.assert_close(found, torch.tensor(alone(folder, "dave", "a text")), rtol=1e-4, atol=1e-5)
        whole = file.read_bytes()
        file.write_bytes(whole[:-30])
        status, answer = ask(port, ("dave", "a text"))
        assert (status, answer["detail"]) == (404, "adapter 'dave' cannot be used: the server's log says why")
        with ThreadPoolExecutor(8) as pool:  # in one batch with others'
            names = ["alice", "dave"] * 8
            assert [one[0] for one in pool.map(lambda name: ask(port, (name, "x")), names)] == [200, 404] * 8
        file.write_bytes(whole)
        until(200, "dave", "a text")
        file.unlink()
        until(404, "dave", "a text")


def test_a_bound_that_fits_one_adapter_gives_the_same_answers(folder):
    asked = [(name, text) for text in TEXTS for name in CONFIGS]
    made = Classifier.load(str(folder / "model"), folder / "adapters", max_composed=1)
    found = made.run([name for name, _ in asked], made.tokenize([Text(*row) for row in asked]))
    assert made.store.composed() == 1
    for logits, row in zip(found, asked, strict=True):
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(alone(folder, *row)), rtol=1e-4, atol=1e-5)


def test_a_text_without_tokens_is_refused(folder):
    made = Classifier.load(str(folder / "model"), folder / "adapters")
    made.tokenizer = byte_tokenizer()  # which puts nothing around a text
    empty, other = made.tokenize([Text("alice", ""), Text("alice", "x")])
    assert isinstance(empty, NoTokens) and len(other) == 1


# --- what comes from outside ----------------------------------------------------------------------------------------


class Known(dict):
    """What the server asks a store."""

    def composed(self):
        return 0

    def resident_bytes(self):
        return 0

    def names(self):
        return list(self)

    def refresh(self):
        pass


class Slow:
    """An engine whose batches wait until `open` is set; it answers with the adapter's number."""

    def __init__(self, names=("alice", "bob")):
        self.store = Known({name: number for number, name in enumerate(names)})
        self.max_tokens = 8
        self.batches = []
        self.open = threading.Event()
        self.open.set()

    def tokenize(self, texts):
        return [text.text.split() for text in texts]

    def run(self, adapters, tokens):
        self.batches.append(list(tokens))
        assert self.open.wait(20)
        if ["fail"] in tokens:
            raise RuntimeError("a secret of the server")
        if ["mute"] in tokens:
            return [[float("nan")]]
        return [[float(self.store[name]), 0.5] for name in adapters]


@pytest.fixture
def slow():
    engine = Slow()
    with serving(lambda: engine, texts=4, body=5000, bodies=9000, waiting=4, rows=2) as (port, service, running):
        yield engine, port, service, running
        engine.open.set()


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("not within ten seconds")


ONE = {"adapter": "alice", "text": "x"}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 422, "Invalid JSON"),
        (b"{", 422, "Invalid JSON"),
        (b"\xff\xfe", 422, "Invalid JSON"),
        (b"[" * 4000, 422, "recursion limit"),
        (b"9" * 4000, 422, "object"),
        (b"null", 422, "object"),
        (b'{"inputs": [{"adapter": "alice", "text": "\\ud800"}]}', 422, "Invalid JSON"),
        (json.dumps({"inputs": []}), 422, "at least 1"),
        (json.dumps({"inputs": [ONE], "more": 1}), 422, "more: Extra"),
        (json.dumps({"inputs": [{**ONE, "text": 1}]}), 422, "inputs.0.text"),
        (json.dumps({"inputs": [{"text": "x"}]}), 422, "inputs.0.adapter"),
        (json.dumps({"inputs": [{**ONE, "adapter": None}]}), 422, "inputs.0.adapter"),
        (json.dumps({"inputs": [{**ONE, "k" * 3000: 1}]}), 422, "k" * 100),
        (json.dumps({"inputs": [{}] * 1000}), 422, "inputs.0"),
        (json.dumps({"inputs": [ONE] * 5}), 413, "4 texts, and this has 5"),
        (b" " * 5001, 413, "5000 bytes"),
        (json.dumps({"inputs": [{**ONE, "adapter": "nobody"}]}), 404, "no adapter 'nobody'"),
        (json.dumps({"inputs": [{**ONE, "text": "fail"}]}), 500, "the server's log"),
        (json.dumps({"inputs": [{**ONE, "text": "mute"}]}), 500, "the server's log"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_wrong_has_its_status_and_a_short_reason(slow, body, status, says):
    _, port, service, _ = slow
    found, answer = call(port, body)
    assert found == status and says in answer["detail"] and len(answer["detail"]) < 800
    assert "secret" not in answer["detail"]
    assert ask(port, ("bob", "x")) == (200, {"outputs": [{"label": 0, "logits": [1.0, 0.5]}]})
    assert service.held == 0


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../alice", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", ".hidden", "a..b", "a" * 129, "é"]
)
def test_names_that_are_none_are_refused_before_they_are_looked_up(slow, name):
    engine, port, _, _ = slow
    engine.store[name] = 0  # were it known
    assert ask(port, (name, "x"))[0] == 422


def test_bodies_without_a_length_and_of_all_clients_together_have_a_bound(slow):
    engine, port, service, _ = slow
    parts = (b" " * 1000 for _ in range(9))
    assert call(port, parts, headers={"Transfer-Encoding": "chunked"}, chunked=True)[0] == 413
    engine.open.clear()
    padded = json.dumps({"inputs": [ONE]}).encode().ljust(4900)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call, port, padded)
        until(lambda: engine.batches)
        assert service.held == 4900
        status, answer = call(port, padded)
        assert status == 429 and "bytes" in answer["detail"]
        engine.open.set()
        assert first.result()[0] == 200
    assert service.held == 0


def test_beyond_its_queue_it_says_so_and_all_that_waited_is_answered(slow):
    engine, port, service, _ = slow
    engine.open.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, port, ("alice", "x"))
        until(lambda: engine.batches)
        waiting = [pool.submit(ask, port, ("bob", "x"), ("alice", "y")) for _ in range(2)]
        until(lambda: service.batcher.waiting() == 4)
        assert "vblora_waiting_rows 4.0" in call(port, path="/metrics")[1]
        status, answer = ask(port, ("alice", "x"))
        assert status == 429 and "wait" in answer["detail"]
        engine.open.set()
        assert [one.result()[0] for one in (first, *waiting)] == [200] * 3
    assert ask(port, ("alice", "x"))[0] == 200


def test_rows_of_a_client_that_has_hung_up_are_not_run(slow):
    engine, port, service, _ = slow
    engine.open.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, port, ("alice", "x"))
        until(lambda: engine.batches)
        body = json.dumps({"inputs": [{**ONE, "text": "gone"}]})
        for part in (body, body[:9]):  # all of it, or not even that
            gone = socket.create_connection(("127.0.0.1", port))
            gone.sendall(f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{part}".encode())
            if part == body:
                until(lambda: service.batcher.waiting() == 1)
            gone.close()
        until(lambda: service.held == len(json.dumps({"inputs": [ONE]})))
        engine.open.set()
        assert first.result()[0] == 200
    assert ask(port, ("bob", "x"))[0] == 200
    assert [["gone"]] not in engine.batches


def test_it_ends_when_what_is_in_flight_is_answered(slow):
    engine, port, service, running = slow
    engine.open.clear()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, port, ("alice", "x"))]
        until(lambda: engine.batches)
        asked += [pool.submit(ask, port, ("alice", "x"), ("bob", "y")) for _ in range(2)]
        until(lambda: service.batcher.waiting() == 4)
        running.should_exit = True
        until(lambda: not running.servers[0].is_serving())
        with pytest.raises(OSError):
            ask(port, ("alice", "x"))
        engine.open.set()
        assert [one.result()[0] for one in asked] == [200] * 3


def test_until_it_is_ready_it_says_so():
    ready = threading.Event()

    def slowly():
        ready.wait(20)
        return Slow()

    service = server.Service(slowly, server.Limits())
    running = server.make_server(service)
    with server.listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        loading = service.start()
        try:
            assert [call(port, path="/health")[0], ask(port, ("alice", "x"))[0]] == [503, 503]
            assert "vblora_adapters 0.0" in call(port, path="/metrics")[1]
            ready.set()
            loading.join()
            assert [call(port, path="/health")[0], ask(port, ("alice", "x"))[0]] == [200, 200]
            page = call(port, path="/openapi.json")[1]["paths"]["/classify"]["post"]
            assert page["requestBody"]["content"]["application/json"]["schema"]["properties"]["inputs"]["items"]
            assert {"200", "404", "413", "422", "429", "503"} <= page["responses"].keys()
            assert "swagger" in call(port, path="/docs")[1]
        finally:
            running.should_exit = True
            thread.join()


# --- the batcher ----------------------------------------------------------------------------------------------------


def test_the_longest_waiting_row_is_run_with_those_of_its_length():
    class Row:
        def __init__(self, length):
            self.tokens = [0] * length

    rows = [Row(length) for length in (10, 100, 11, 9, 25, 10, 6, 5)]
    assert [len(row.tokens) for row in choose(rows, 4, 1000)] == [10, 10, 11, 9]
    assert [len(row.tokens) for row in choose(rows, 9, 1000)] == [10, 10, 11, 9, 6]  # 5 is not half of 11
    assert [len(row.tokens) for row in choose(rows, 9, 22)] == [10, 10]
    assert [len(row.tokens) for row in choose(rows[1:], 9, 50)] == [100]  # alone, however long
    assert choose([], 9, 50) == []


def test_all_rows_of_a_request_are_taken_or_none_and_none_after_the_end():
    engine = Slow()
    engine.open.clear()
    batcher = Batcher(engine, max_rows=1, max_waiting=2)
    batcher.submit([Text("alice", "x")])
    until(lambda: engine.batches)
    kept = batcher.submit([Text("bob", "x")])
    with pytest.raises(Full):
        batcher.submit([Text("alice", "x")] * 2)
    assert batcher.waiting() == 1
    gone = batcher.submit([Text("alice", "gone")])[0]
    assert gone.cancel()
    engine.open.set()
    batcher.stop()
    assert kept[0].result() == [1.0, 0.5] and engine.batches == [[["x"]], [["x"]]]
    with pytest.raises(Stopped):
        batcher.submit([Text("alice", "x")])


def test_a_batch_that_fails_and_rows_that_cannot_be_tokenised_are_theirs_alone():
    class Wrong(Slow):
        def tokenize(self, texts):
            if any(text.text == "all" for text in texts):
                raise RuntimeError("of the tokenizer")
            return [ValueError("this one") if text.text == "one" else ["x"] for text in texts]

    engine = Wrong()
    batcher = Batcher(engine)
    one, other = batcher.submit([Text("alice", "one"), Text("bob", "x")])
    assert other.result(10) == [1.0, 0.5] and str(one.exception(10)) == "this one"
    assert str(batcher.submit([Text("alice", "all")])[0].exception(10)) == "of the tokenizer"
    assert batcher.submit([Text("bob", "x")])[0].result(10) == [1.0, 0.5]
    engine.tokenize = lambda texts: [text.text.split() for text in texts]
    fails, works = batcher.submit([Text("alice", "fail"), Text("bob", "x")])
    assert works.result(10) == [1.0, 0.5] and "a secret" in str(fails.exception(10))
    assert engine.batches[-3:] == [[["fail"], ["x"]], [["fail"]], [["x"]]]
    batcher.stop()


# --- the command ----------------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    assert cli.main(["serve", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vblora: error: ")
    return line


def test_what_is_wrong_with_the_command_is_one_line(folder, tmp_path, capsys, monkeypatch):
    model, adapters = folder / "model", folder / "adapters"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be had" in refused(capsys, model, adapters, "--port", port)
    anywhere = ("--port", 0)
    assert "cannot be had" in refused(capsys, model, adapters, "--port", 99999)
    assert "no such folder" in refused(capsys, model, tmp_path / "nowhere", *anywhere)
    assert "no packed adapter" in refused(capsys, model, tmp_path, *anywhere)
    assert "nowhere" in refused(capsys, tmp_path / "nowhere", adapters, *anywhere)
    assert "--keep: " in refused(capsys, model, adapters, "--keep", "much", *anywhere)
    assert "bytes, more than the 1,000 allowed" in refused(capsys, model, adapters, "--keep", "1kB", *anywhere)
    assert "64 positions" in refused(capsys, model, adapters, "--max_tokens", 65, *anywhere)
    assert "--batch_tokens 63" in refused(capsys, model, adapters, "--batch_tokens", 63, *anywhere)
    assert "more texts (64) than waiting" in refused(capsys, model, adapters, "--queue", 63, *anywhere)
    assert "rows must be at least 1" in refused(capsys, model, adapters, "--batch_rows", 0, *anywhere)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "needs fastapi: pip install fastapi" in refused(capsys, model, adapters)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (config(2, ["query"]), "it has no classifier (modules_to_save)"),
        (config(2, ["query"], modules_to_save=["classifier"]), "does not fit"),
    ],
    ids=["no head", "wider"],
)
def test_an_adapter_that_does_not_fit_is_named_at_the_start(folder, tmp_path, capsys, settings, says):
    model = load(folder)
    if settings.modules_to_save:
        size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        model = AutoModelForSequenceClassification.from_config(BertConfig(num_labels=3, **size))
    vblora.attach(model, settings).pack(tmp_path / "erin.safetensors")
    line = refused(capsys, folder / "model", tmp_path, "--port", 0)
    assert "adapter 'erin'" in line and says in line
