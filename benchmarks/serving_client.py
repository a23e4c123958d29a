"""What the benchmarks of `vblora serve` share: adapters of a small encoder, the server as a process, and a client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as messages

import vblora

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "NLU"))

from encoders import find_encoder  # noqa: E402

CONFIG = vblora.VBLoRAConfig(
    r=4,
    num_vectors=90,
    vector_length=64,
    topk=2,
    init_vector_bank_bound=0.2,
    target_modules="all-linear",
    modules_to_save=["classifier"],
)
SENTENCE = (
    "the film was a slow and quiet story about an old sailor who sees his house again after many years at sea and "
    "finds that nobody there knows him any more which is told with much care and without one false note"
)
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[start : start + 8 + 5 * (start % 4)]) for start in range(20)]  # of 8 to 23 words
LABELS = 2
READY_SECONDS = 300


def model_folder(given: Path | None) -> Path:
    """all-MiniLM-L6-v2's, unless another is given."""
    return find_encoder() if given is None else given


def load_model(folder: Path) -> Any:
    """The encoder as a classifier; its head is drawn at random."""
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS).eval()


def write_adapter(model: Any, file: Path, seed: int, lora: Path | None = None) -> None:
    """A packed adapter with a head of its own; as plain LoRA too, where a folder is given."""
    adapter = vblora.attach(model, CONFIG, seed=seed)
    before = {name: module.state_dict() for name, module in adapter.saved.items()}
    before = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in before.items()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in adapter.saved.values():
            for parameter in module.parameters():
                parameter.normal_(generator=generator)
    adapter.pack(file)
    if lora is not None:
        adapter.export_lora(lora)
    for name, module in adapter.saved.items():
        module.load_state_dict(before[name])
    adapter.detach()


def rows(names: Sequence[str], texts: Sequence[str]) -> bytes:
    """A request's body."""
    pairs = zip(names, texts, strict=True)
    return json.dumps({"inputs": [{"adapter": name, "text": text} for name, text in pairs]}).encode()


@torch.no_grad()
def logits_alone(model: Any, tokenizer: Any, file: Path, texts: Sequence[str]) -> torch.Tensor:
    """What an adapter answers by itself (texts, labels), text by text."""
    adapter = vblora.load(model, file)
    found = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    adapter.detach()
    return torch.stack(found)


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


# --- the server -----------------------------------------------------------------------------------------------------


class Server:
    """`vblora serve` as a process of its own, which has answered that it is ready."""

    def __init__(self, process: subprocess.Popen[str], port: int, seconds: float) -> None:
        self.process = process
        self.port = port
        self.seconds_to_ready = seconds

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        """A figure of /metrics; 0 for one that is not there yet."""
        found = [line for line in self.get("/metrics").splitlines() if line.startswith(f"{name} ")]
        return float(found[0].split()[1]) if found else 0.0

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def end(self) -> int:
        """Send SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(60)


@contextlib.contextmanager
def serving(model: Path, adapters: Path, *flags: str) -> Iterator[Server]:
    """A server that is ready.

    Raises:
        ValueError: it ended instead; its message.
    """
    command = [sys.executable, "-m", "vblora.cli", "serve", str(model), str(adapters), "--port", "0", *flags]
    began = time.monotonic()
    with (adapters.parent / f"log{began}").open("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "127.0.0.1:" in line:
                server = Server(process, int(line.partition("127.0.0.1:")[2].partition("/")[0]), 0.0)
                if _is_ready(server):
                    server.seconds_to_ready = time.monotonic() - began
                    yield server
                    return
            log.seek(0)
            raise ValueError(f"the server did not start: {log.read()[-2000:]}")
        finally:
            process.kill()
            process.wait()
            log.seek(0)
            if said := log.read():
                print(f"the server's log ends: {said[-2000:]}", file=sys.stderr)


def _is_ready(server: Server) -> bool:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        with contextlib.suppress(OSError):
            server.get("/health")
            return True
        time.sleep(0.2)
    return False


# --- the client -----------------------------------------------------------------------------------------------------


class Client:
    """One connection that is kept open."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> tuple[int, Any]:
        """The status, and the answer's JSON; None where the connection was closed instead."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        try:
            writer.write(head(len(body)) + body)
            await writer.drain()
            status = int((await reader.readline()).split()[1])
            headers: dict[bytes, bytes] = {}
            while (line := await reader.readline()).strip():
                name, _, value = line.partition(b":")
                headers[name.lower()] = value.strip()
            content = await reader.readexactly(int(headers[b"content-length"]))
        except (OSError, IndexError, asyncio.IncompleteReadError):
            self.close()
            return 0, None
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return status, json.loads(content)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def head(length: int) -> bytes:
    """A request's head."""
    return (
        f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()
