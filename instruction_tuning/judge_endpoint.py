"""The endpoint that a judging model answers at: asked patiently, and without its key in any message."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import random
import re
import sys
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

OPENAI = "https://api.openai.com/v1"
TEMPERATURE, MAX_TOKENS = 0, 2048  # FastChat's
LONGEST_WAIT = 60.0  # seconds that are added before a try, at most
REFUSED_FIRST = 10  # prompts refused before any is answered: the reason is not in the prompts


class Refused(ValueError):
    """The endpoint will not answer, however often it is asked."""


class PromptRefused(Exception):
    """The endpoint will not answer this prompt."""


# A refusal with status 400 that has nothing to do with the prompt.
_OF_ALL = re.compile(
    r"api[ _-]?key|model_not_found|invalid_model|model\b.{0,80}\b(?:not exist|not found|not a valid|unknown)"
    r"|credit|billing|quota|unauthori[sz]ed|authenticat",
    re.IGNORECASE | re.DOTALL,
)
_OF_CONTENT = re.compile(r"moderat|flagged|content|filter|policy|safety|inspection", re.IGNORECASE)
_NOT_TAKEN = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|invalid|extra[ _](?:inputs|forbidden)|not permitted"
    r"|not allowed|deprecated|no longer|must be|\bonly\b|strictly",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(r"context[ _]length|context window|too (?:long|large|many)|maximum context", re.IGNORECASE)


def _of_prompt(status: int, text: str) -> bool:
    """Whether a refusal is of the prompt that was sent, and not of the key, the model or the account."""
    if status in (403, 451):
        return bool(_OF_CONTENT.search(text))
    of_all = _OF_ALL.search(text) and not _OF_CONTENT.search(text) and not _TOO_LONG.search(text)
    return status in (400, 413, 422) and not of_all


@dataclass
class Endpoint:
    """An OpenAI-compatible endpoint, asked patiently through OpenAI's client. Threads may share one."""

    url: str
    key: str = field(repr=False)
    judge: str
    tries: int = 10
    backoff: float = 2.0
    timeout: float = 120.0
    seconds_between: float = 0.0
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        self._stopped, self._why = threading.Event(), ""
        self._lock = threading.Lock()
        self._next = 0.0
        self._client: Any = None
        self._not_taken: set[str] = set()  # parameters that the model refuses
        self._answered, self._refused = False, 0

    @classmethod
    def from_environment(cls, judge: str, needed: bool = True, **settings: float) -> Endpoint:
        """The endpoint that OPENAI_BASE_URL and OPENAI_API_KEY name.

        Args:
            judge: the model's name there.
            needed: whether it will be asked; a plan needs neither key nor client.
            settings: the other attributes.

        Raises:
            ValueError: no address, no key for OpenAI itself, or no client.
        """
        url = (os.environ.get("OPENAI_BASE_URL") or OPENAI).strip().rstrip("/")
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"OPENAI_BASE_URL must begin with http:// or https://, not {masked(url, key)!r}")
        if not key and url == OPENAI and needed:
            raise ValueError("OPENAI_API_KEY is not set; an endpoint without a key is named by OPENAI_BASE_URL")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError("OPENAI_API_KEY holds characters that no key has")
        if needed and importlib.util.find_spec("openai") is None:
            raise ValueError("judging needs OpenAI's client: pip install openai")
        return cls(url, key, judge, **settings)  # type: ignore[arg-type]

    @property
    def place(self) -> str:
        """The address for messages: without a name, a password or a query in it."""
        address = urllib.parse.urlsplit(self.url)
        host = address.netloc.rpartition("@")[2]
        return masked(f"{address.scheme}://{host}{address.path}", self.key, words=False)

    def complete(self, messages: list[dict[str, str]]) -> str:
        """The model's reply to these messages.

        Raises:
            PromptRefused: the endpoint refuses these messages.
            ValueError: the endpoint refuses to answer at all, or has not answered in so many tries.
        """
        import openai

        while True:
            sent = self._parameters()
            headers = None if self.key else {"Authorization": openai.Omit()}
            try:
                response = self._connected().chat.completions.with_raw_response.create(
                    model=self.judge, messages=messages, extra_headers=headers, **sent
                )
            except openai.APIStatusError as error:
                if self._goes_without(error.response.status_code, error.response.text, sent):
                    continue
                raise self._failure(error.response) from None
            except openai.APIConnectionError as error:  # out of reach, cut off, too slow, or no chat completion
                cause = error.__cause__ or error
                raise self._given_up(self._shown(str(cause) or type(cause).__name__)) from None
            except openai.OpenAIError as error:
                raise Refused(self._shown(str(error))) from None
            self._answered = True
            return masked(reply(response.http_response.content), self.key, words=False)

    def stop(self, why: str) -> None:
        """Send nothing more; whoever is about to, or waits to, is told the first reason given."""
        with self._lock:
            self._why = self._why or why
            self._stopped.set()

    # ---------------------------------------------------------------------------------- the client

    def _connected(self) -> Any:
        """The client. It tries again by itself; what it does before and after each try is said here."""
        import openai

        with self._lock:
            if self._client is None:
                # A redirection is an error: the key would be sent on to wherever it leads.
                hooks: dict[str, list[Any]] = {"request": [self._before], "response": [self._after]}
                try:
                    self._client = openai.OpenAI(
                        api_key=self.key or "none",
                        base_url=self.url,
                        max_retries=self.tries - 1,
                        timeout=self.timeout,
                        http_client=openai.DefaultHttpxClient(follow_redirects=False, event_hooks=hooks),
                    )
                except Exception as error:  # an address or a proxy that is none, in several libraries' words
                    raise Refused(f"{self.place} cannot be asked: {self._shown(str(error))}") from None
        return self._client

    def _before(self, request: Any) -> None:
        """Wait until a request may start; beyond the client's own waiting before another try."""
        if tried := int(request.headers.get("x-stainless-retry-count", 0)):
            # Doubling, and spread so that several workers do not come back at once.
            wait = min(LONGEST_WAIT, self.backoff * 2 ** min(tried - 1, 30)) * random.uniform(0.5, 1.0)
            print(f"{self.place} did not answer: try {tried + 1} of {self.tries}", file=sys.stderr)
            self._pause(wait)
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self.seconds_between
        self._pause(start - time.monotonic())

    def _after(self, response: Any) -> None:
        """Make an error of an answer that the client would take for a good one, and end what it would try in vain."""
        import httpx2  # the client's own library

        response.read()
        if response.status_code == 429 and "insufficient_quota" in response.text:  # OpenAI's for an empty account
            raise self._failure(response)
        if response.status_code == 200:
            try:
                reply(response.content)
            except ValueError as error:
                raise httpx2.DecodingError(str(error), request=response.request) from None

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(max(0.0, seconds)):
            raise Refused(self._why)

    # ---------------------------------------------------------------------------------- parameters

    def _parameters(self) -> dict[str, Any]:
        """FastChat's, but for those that the model has refused."""
        limit = next((n for n in ("max_tokens", "max_completion_tokens") if n not in self._not_taken), None)
        return {
            **({} if "temperature" in self._not_taken else {"temperature": TEMPERATURE}),
            **({limit: self.max_tokens} if limit else {}),
        }

    def _goes_without(self, status: int, text: str, sent: dict[str, Any]) -> bool:
        """Whether a refusal was of a parameter that was sent; it is not sent again in this run."""
        if status not in (400, 422) or not _NOT_TAKEN.search(text) or _TOO_LONG.search(text) or "content_" in text:
            return False
        named = {name: found for name in sent if (found := re.search(rf"\b{name}\b", text))}
        if not named:
            return False
        name = min(named, key=lambda name: named[name].start())  # "use max_completion_tokens instead" comes second
        with self._lock:
            if name not in self._not_taken:
                self._not_taken.add(name)
                print(f"{self.judge} does not take {name}={sent[name]}: asked without it from here on", file=sys.stderr)
        return True

    # ---------------------------------------------------------------------------------- refusals

    def _failure(self, response: Any) -> Exception:
        """What an HTTP status means, once the client has given up."""
        status = response.status_code
        said = self._shown(f"{response.reason_phrase}: {_message(response.text)}")
        if 300 <= status < 400:
            said += f" to {self._shown(response.headers.get('Location', ''))}: set OPENAI_BASE_URL to where it is"
        elif (status in (408, 409, 429) or status >= 500) and "insufficient_quota" not in response.text:
            tried = 1 + int(response.request.headers.get("x-stainless-retry-count", 0))
            if tried >= self.tries:
                return self._given_up(f"{status} {said}")
            if wait := response.headers.get("Retry-After"):
                said += f" (it asks to wait: {self._shown(wait)})"
        elif _of_prompt(status, response.text):
            return self._prompt_refused(f"{status} {said}")
        return Refused(f"{self.place} refuses: {status} {said}")

    def _prompt_refused(self, said: str) -> Exception:
        with self._lock:
            self._refused += 1
            if not self._answered and self._refused >= REFUSED_FIRST:
                return Refused(f"{self.place} refuses the first {self._refused} prompts: {said}")
        return PromptRefused(said)

    def _given_up(self, why: str) -> Refused:
        return Refused(f"{self.place} did not answer in {self.tries} tries: {why}; the same command goes on from here")

    def _shown(self, text: str) -> str:
        """What the endpoint said: on one line, without the key."""
        text = "".join(letter if letter.isprintable() else " " for letter in masked(text, self.key))
        return masked(" ".join(text.split()), self.key)[:500]


SHORT_KEY = 8  # characters; parts of a key that are as long give it away, and shorter ones are found in any text


def masked(text: str, key: str, words: bool = True) -> str:
    """The text with *** for the key and long parts of it, also as it is written in addresses, JSON and Base64.

    A key below SHORT_KEY characters is masked where it stands as a word, or with `words` unset not at all: its letters
    are those of other words.
    """
    if not key:
        return text
    if len(key) < SHORT_KEY:
        return re.sub(rf"(?<![A-Za-z0-9]){re.escape(key)}(?![A-Za-z0-9])", "***", text) if words else text
    coded = base64.b64encode(key.encode(errors="replace")).decode()
    forms = (key, urllib.parse.quote(key, safe=""), json.dumps(key)[1:-1], coded.rstrip("="))
    parts = {form.lower()[at : at + SHORT_KEY] for form in forms for at in range(len(form) - SHORT_KEY + 1)}
    folded = "".join(letter.lower() if letter.isascii() else letter for letter in text)  # as long as the text
    shown, at, hidden_to = "", 0, 0
    while at < len(text):
        if folded[at : at + SHORT_KEY] in parts:
            shown += "" if at <= hidden_to and hidden_to else "***"
            hidden_to = at + SHORT_KEY
        elif at >= hidden_to:
            shown += text[at]
        at += 1
    return shown


def reply(content: bytes) -> str:
    """The text in a chat completion, which may come in parts; one without text, such as a refusal, may be empty.

    Raises:
        ValueError: this is no chat completion.
    """
    try:
        message = json.loads(content)["choices"][0]["message"]
        said = _text(message.get("content")) or _text(message.get("refusal"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        said = None
    if said is None:
        raise ValueError(f"it answered with no chat completion: {content[:2000].decode(errors='replace')!r}")
    return said


def _text(content: Any) -> str:
    """The text of a message's content: a text, or parts; those that hold thoughts or no text are left out."""
    if isinstance(content, str):
        return content
    said = []
    for part in content if isinstance(content, list) else [content]:
        value = part.get("text", part.get("refusal")) if isinstance(part, dict) else part
        value = value.get("value") if isinstance(value, dict) else value
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if isinstance(value, str) and kind in ("text", "output_text", "refusal"):
            said.append(value)
    return "".join(said)


def _message(text: str) -> str:
    """What an error page says: OpenAI's {"error": {"message": ...}} and its kind, or the page."""
    try:
        value = json.loads(text)
        error = value.get("error", value) if isinstance(value, dict) else value
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError):
        return text
