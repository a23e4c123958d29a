"""`vblora serve MODEL ADAPTERS/`: one classifier for many users, over HTTP.

    POST /classify  {"inputs": [{"adapter": "alice", "text": "..."}]} -> {"outputs": [{"label": 1, "logits": [...]}]}
    GET  /health    200 when it answers, 503 while it loads
    GET  /metrics   for Prometheus
    GET  /docs      the OpenAPI page

Whatever comes in has a bound: bodies (each, and all that are held at once), texts of a request, tokens of a text, rows
that wait, connections. A name is looked up among those of the folder's files, and never becomes a path.

FastAPI, uvicorn and prometheus_client are imported here alone, and this module by the command alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Any

import prometheus_client
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

import vblora
from vblora.serving.batcher import Batcher, Full, Stopped, Text
from vblora.serving.classifier import Classifier, NoTokens, NotServed, TooLong
from vblora.serving.expanded import NAME

logger = logging.getLogger(__name__)

BODY_SECONDS = 30  # for a request's body to come
STOP_SECONDS = 30  # for requests in flight to be answered when the server ends
LOOK_SECONDS = 1.0  # between two looks into the folder
SHOWN_ERRORS = 5
STATUSES = {NotServed: 404, TooLong: 413, NoTokens: 422}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Limits:
    """What is taken at most.

    Attributes:
        texts: of one request.
        body: bytes of one request.
        bodies: bytes of all requests that are being read or answered.
        waiting: rows that wait for a batch.
        rows, tokens: of a batch; tokens with padding.
        connections: open at once.
    """

    texts: int = 64
    body: int = 2**18
    bodies: int = 2**26
    waiting: int = 1024
    rows: int = 32
    tokens: int = 4096
    connections: int = 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"the limit of {name} must be at least 1, not {value}")
        for small, large in (("texts", "waiting"), ("body", "bodies")):
            if getattr(self, small) > getattr(self, large):
                raise ValueError(
                    f"a request may have more {small} ({getattr(self, small)}) than {large} allows "
                    f"({getattr(self, large)}): it would never be taken"
                )


# --- what is asked and answered -------------------------------------------------------------------------------------


def _is_name(text: str) -> str:
    if NAME.fullmatch(text) is None:
        raise ValueError(
            "a name has letters, digits, '.', '_' and '-', at most 128, and no dot in front or two in a row"
        )
    return text


class Input(BaseModel):
    """A text, or a pair of texts, and the adapter that is to read it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    adapter: Annotated[str, AfterValidator(_is_name)]
    text: str
    text_pair: str | None = None


class Question(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    inputs: list[Input] = Field(min_length=1)


class Output(BaseModel):
    """The adapter's logits, and the number of the largest; no label where there is one logit, a score."""

    label: int | None
    logits: list[float]


class Answer(BaseModel):
    outputs: list[Output]


class Problem(BaseModel):
    detail: str


def _answer(rows: list[list[float]]) -> dict[str, Any]:
    labels = [None if len(row) == 1 else max(range(len(row)), key=row.__getitem__) for row in rows]
    return {"outputs": [{"label": label, "logits": row} for label, row in zip(labels, rows, strict=True)]}


# --- the service ------------------------------------------------------------------------------------------------------


class Service:
    """A classifier that is being loaded, its batcher, and what is counted.

    Args:
        load: makes the classifier; called in a thread of its own by `start`.
        limits: what is taken at most.
    """

    def __init__(self, load: Callable[[], Classifier], limits: Limits) -> None:
        self.limits = limits
        self.classifier: Classifier | None = None
        self.batcher: Batcher | None = None
        self.failure: Exception | None = None
        self.held = 0  # bytes of bodies
        self.registry = CollectorRegistry()
        options: Any = {"registry": self.registry}
        self.requests = Counter("vblora_requests", "Requests of /classify by status", ["status"], **options)
        self.seconds = Histogram("vblora_request_seconds", "Answered requests", buckets=SECONDS, **options)
        self.batch_rows = Histogram("vblora_batch_rows", "Rows of a batch", buckets=ROWS, **options)
        self._gauges(options)
        self._load = load

    def _gauges(self, options: Any) -> None:
        def gauge(name: str, text: str, value: Callable[[], int]) -> None:
            Gauge(f"vblora_{name}", text, **options).set_function(value)

        def store(value: Callable[[Any], int]) -> Callable[[], int]:
            return lambda: 0 if self.classifier is None else value(self.classifier.store)

        gauge("waiting_rows", "Rows that wait for a batch", lambda: self.batcher.waiting() if self.batcher else 0)
        gauge("body_bytes", "Bytes of the requests that are being read or answered", lambda: self.held)
        gauge("adapters", "Adapters known", store(len))
        gauge("composed_adapters", "Adapters whose factors are in memory", store(lambda store: store.composed()))
        gauge("adapter_bytes", "Bytes of adapters in memory", store(lambda store: store.resident_bytes()))

    def start(self, failed: Callable[[], None] = lambda: None) -> threading.Thread:
        """Load, and be ready then; `failed` is called where that fails, with the reason in `failure`."""

        def work() -> None:
            try:
                classifier = self._load()
                if self.limits.tokens < classifier.max_tokens:
                    raise ValueError(
                        f"--batch_tokens {self.limits.tokens} is less than a text may have ({classifier.max_tokens}): "
                        "lower --max_tokens too"
                    )
                for name in classifier.store.names():
                    if NAME.fullmatch(name) is None:
                        logger.warning("the file of adapter %r has a name that no request may ask for", name)
                limits = {"max_rows": self.limits.rows, "max_tokens": self.limits.tokens}
                on_batch: Callable[[int], None] = self.batch_rows.observe
                self.batcher = Batcher(classifier, **limits, max_waiting=self.limits.waiting, on_batch=on_batch)
                self.classifier = classifier
            except Exception as error:
                self.failure = error
                failed()

        thread = threading.Thread(target=work, name="loading", daemon=True)
        thread.start()
        return thread

    async def look(self) -> None:
        """Look into the folder again and again, for adapters that come and go."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self.classifier is not None:
                try:
                    await asyncio.to_thread(self.classifier.store.refresh)
                except (ValueError, OSError) as error:
                    logger.warning("%s", error)

    async def answer(self, request: Request) -> dict[str, Any]:
        """What is asked, answered.

        Raises:
            HTTPException: with the status that says why not.
        """
        if self.batcher is None or self.classifier is None:
            raise HTTPException(503, "it is loading", {"Retry-After": "1"})
        with self._holding() as hold:
            texts = parse(await _body(request, self.limits.body, hold), self.limits.texts)
            for text in texts:
                if text.adapter not in self.classifier.store:
                    raise HTTPException(404, f"there is no adapter {text.adapter!r}")
            try:
                futures = self.batcher.submit(texts)
            except Full:
                raise HTTPException(429, "too many texts wait already", {"Retry-After": "1"}) from None
            except Stopped:
                raise HTTPException(503, "it is ending") from None
            return _answer(await _results(request, futures))

    @contextlib.contextmanager
    def _holding(self) -> Any:
        """A function that counts bytes of this request as held until the block ends."""
        mine = 0

        def hold(count: int) -> None:
            nonlocal mine
            if self.held + count > self.limits.bodies:
                raise HTTPException(429, "too many bytes are being read already", {"Retry-After": "1"})
            self.held += count
            mine += count

        try:
            yield hold
        finally:
            self.held -= mine


def parse(body: bytes, most: int) -> list[Text]:
    """The texts of a request.

    Raises:
        HTTPException: 422 for what is not as `Question` says, 413 for too many texts.
    """
    try:
        inputs = Question.model_validate_json(body).inputs
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[:SHOWN_ERRORS]
        places = [".".join(str(part)[:100] for part in one["loc"]) for one in found]
        raise HTTPException(
            422, "; ".join(f"{place}: {one['msg']}".strip(": ") for place, one in zip(places, found, strict=True))
        ) from None
    if len(inputs) > most:
        raise HTTPException(413, f"a request may have {most} texts, and this has {len(inputs)}")
    return [Text(one.adapter, one.text, one.text_pair) for one in inputs]


async def _body(request: Request, most: int, hold: Callable[[int], None]) -> bytes:
    """The request's body, if it is not too large and comes in time."""
    too_large = HTTPException(413, f"a request may have {most} bytes")

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > most:
                raise too_large
            hold(len(chunk))
            body += chunk
        return bytes(body)

    if int(request.headers.get("content-length") or 0) > most:
        raise too_large
    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the body did not come within {BODY_SECONDS} seconds") from None


async def _results(request: Request, futures: list[Future[Any]]) -> list[Any]:
    """The rows' answers; where the client has gone, rows that wait are not run."""
    rows = [asyncio.wrap_future(future) for future in futures]
    answered: asyncio.Future[Any] = asyncio.ensure_future(asyncio.wait(rows))
    gone: asyncio.Future[Any] = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({answered, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            raise ClientDisconnect
    finally:
        for waited in (answered, gone, *rows):
            waited.cancel()
    found = [row.exception() or row.result() for row in rows]
    for error in found:
        if isinstance(error, BaseException):
            status = next((status for kind, status in STATUSES.items() if isinstance(error, kind)), None)
            raise error if status is None else HTTPException(status, str(error))
    return found


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# --- over HTTP --------------------------------------------------------------------------------------------------------


def make_app(service: Service) -> FastAPI:
    """The HTTP face of a service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        looking = asyncio.create_task(service.look())
        yield
        looking.cancel()
        if service.batcher is not None:
            await asyncio.to_thread(service.batcher.stop)

    app = FastAPI(title="vblora serve", version=vblora.__version__, lifespan=lifespan)
    schema = Question.model_json_schema()
    schema["properties"]["inputs"]["items"] = schema.pop("$defs")["Input"]
    problems: dict[int | str, dict[str, Any]] = {
        404: {"model": Problem, "description": "there is no such adapter, or it cannot be used"},
        408: {"model": Problem, "description": "the body did not come in time"},
        413: {"model": Problem, "description": "too many bytes, texts or tokens"},
        422: {"model": Problem, "description": "the body is not as it should be"},
        429: {"model": Problem, "description": "too much waits already: ask again later"},
        503: {"model": Problem, "description": "it is loading, or ending"},
    }
    body = {"required": True, "content": {"application/json": {"schema": schema}}}

    @app.post("/classify", responses={200: {"model": Answer}, **problems}, openapi_extra={"requestBody": body})
    async def classify(request: Request) -> Response:
        """Each text's logits by its own adapter. The body is a JSON object as below."""
        began = time.perf_counter()
        status = 500
        try:
            answer = JSONResponse(await service.answer(request))
            status = 200
            service.seconds.observe(time.perf_counter() - began)
            return answer
        except HTTPException as error:
            status = error.status_code
            return JSONResponse({"detail": error.detail}, status, error.headers)
        except ClientDisconnect:
            status = 499  # nobody reads it
            return Response(status_code=status)
        except Exception:
            logger.exception("a request failed")
            return JSONResponse({"detail": "it failed: the server's log says why"}, status)
        finally:
            service.requests.labels(str(status)).inc()

    @app.get("/health", responses={503: {"model": Problem}})
    def health() -> JSONResponse:
        """Whether it answers."""
        if service.batcher is None:
            return JSONResponse({"detail": "it is loading"}, 503)
        return JSONResponse({"detail": "it answers"})

    @app.get("/metrics")
    def metrics() -> Response:
        """For Prometheus."""
        content = prometheus_client.generate_latest(service.registry)
        return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return app


def make_server(service: Service) -> uvicorn.Server:
    """uvicorn's server of a service; `run(sockets=[...])` serves until it is told to end."""
    config = uvicorn.Config(
        make_app(service),
        http="h11",  # which bounds a request's head
        ws="none",
        log_level="error",  # a warning for whatever is no HTTP would let anybody fill the log
        access_log=False,
        server_header=False,
        limit_concurrency=service.limits.connections,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    return uvicorn.Server(config)


def serve(load: Callable[[], Classifier], host: str, port: int, limits: Limits) -> str:
    """Serve until SIGTERM or SIGINT, after which requests in flight are answered; what is to be said at the end.

    Raises:
        ValueError: the address cannot be had, or what `load` raises.
    """
    with listening(host, port) as listener:
        service = Service(load, limits)
        server = make_server(service)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        print(f"loading; {address}/health says when it answers, {address}/docs how it is asked", flush=True)

        def failed() -> None:
            server.should_exit = True

        service.start(failed)
        with _signals_end_it_alone():
            server.run(sockets=[listener])
    if service.failure is not None:
        raise service.failure
    return "ended; requests in flight were answered"


@contextlib.contextmanager
def _signals_end_it_alone() -> Iterator[None]:
    """uvicorn ends by a signal, and raises it once more when it has ended: this process goes on then."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free.

    Raises:
        ValueError: the port is in use, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"port {port} of {host} cannot be had ({why}): name another with --port or --host") from error
