"""A small MT-Bench, and an endpoint that judges it or fails as it is told."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write {a} line.", "Now in \u2028 capitals."]},
    {"question_id": 104, "category": "reasoning", "turns": ["Three sisters?", "Two?"], "reference": ["0", "1"]},
    {"question_id": 112, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"]},
    {"question_id": 141, "category": "stem", "turns": ["Why is the sky blue?", "Really?"]},
]
PROMPTS = {
    "single-v1": "Rate.\n[Q]{question}[A]{answer}",
    "single-math-v1": "Rate.\n[Q]{question}[R]{ref_answer_1}[A]{answer}",
    "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
    "single-math-v1-multi-turn": "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}|{answer_1}|{answer_2}",
}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answer_row(number, model, turns):
    """As FastChat's gen_model_answer.py writes it."""
    choices = [{"index": 0, "turns": turns}]
    return {"question_id": number, "answer_id": "x", "model_id": model, "choices": choices, "tstamp": 1686286924.844282}


class JudgeServer:
    """An OpenAI-compatible endpoint on this machine. It rates each prompt by its length, whoever asks and when.

    `script` holds what to do instead with the next requests: functions of the handler and the prompt. Requests are
    kept, with their time of arrival and how many were under way then.
    """

    def __init__(self):
        self.script, self.requests, self.lock, self.under_way = [], [], threading.Lock(), 0
        self.hold = 0.0
        self.answer = lambda handler, prompt, body: rate(handler, prompt)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.under_way += 1
                    action = outer.script.pop(0) if outer.script else None
                    seen = {
                        "path": self.path,
                        "headers": {name.title(): value for name, value in self.headers.items()},
                        "body": body,
                        "at": time.monotonic(),
                    }
                    outer.requests.append({**seen, "under_way": outer.under_way})
                time.sleep(outer.hold)
                with outer.lock:
                    outer.under_way -= 1
                prompt = body["messages"][-1]["content"]
                action(self, prompt) if action else outer.answer(self, prompt, body)

            do_GET = do_POST

            def send(self, status, content, headers=(), length=None):
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content) if length is None else length))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # whoever asked has gone: that is what some tests want
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def says(text):
    """Answers with a chat completion of this text."""

    def act(handler, prompt):
        completion = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
        handler.send(200, json.dumps(completion).encode())

    return act


def rate(handler, prompt):
    says(f"It has {len(prompt)} characters. Rating: [[{1 + len(prompt) % 10}]]")(handler, prompt)


def fails(status, message="no", headers=()):
    """Answers with an error as OpenAI words it."""
    return lambda handler, prompt: handler.send(status, json.dumps({"error": {"message": message}}).encode(), headers)


def sends(content, status=200):
    return lambda handler, prompt: handler.send(status, content)


def cuts(handler, prompt):
    """Closes the connection without an answer."""
    handler.close_connection = True
    handler.connection.close()


def cuts_in_the_middle(handler, prompt):
    handler.close_connection = True
    handler.send(200, b'{"choices": [{"mess', length=500)


def dawdles(seconds):
    def act(handler, prompt):
        time.sleep(seconds)
        rate(handler, prompt)

    return act
