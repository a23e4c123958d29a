"""`vblora serve` under ten minutes of load of all kinds at once: every answer is right, and memory stays flat.

    python benchmarks/serving_soak.py [--minutes 10] [--adapters 24] [--record results/serving_soak.json]

Clients ask without a pause, for one text or several, and every answer is compared with what the adapter gives alone in
this process. Meanwhile adapters are replaced by other versions (an answer must be that of a version that was there
while it was asked for), some are taken away and come back, clients hang up before, within and after their bodies, and
bodies that are too large, damaged or hostile come in, each of which must have its status. The server keeps half of the
adapters ready. At the end it is told to stop while requests are in flight: they must be answered.

Whatever was wrong is an error. The record has the counts and the memory by time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from serving_client import (
    TEXTS,
    Client,
    Server,
    head,
    load_model,
    load_tokenizer,
    logits_alone,
    model_folder,
    rows,
    serving,
    write_adapter,
)
from turns import parser, report, require_positive

from vblora_experiments import commands

CLOSE = 1e-3  # logits of size 10: rounding, as batches are padded
LOOKED = 5.0  # seconds within which a file that came or went is known
VERSIONS = 3
BODY, MOST_TEXTS = 20_000, 16  # the server's limits here
ONE = {"adapter": "user0", "text": "x"}


def _json(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


HOSTILE: list[tuple[bytes, int]] = [
    (b"", 422),
    (b"{", 422),
    (b"\xff" * 100, 422),
    (b"[" * 15_000, 422),
    (b'{"inputs":' * 1500, 422),
    (b"1" * 15_000, 422),
    (_json(ONE, more=1), 422),
    (_json({**ONE, "text": ["x"]}), 422),
    (_json({**ONE, "adapter": "../user0"}), 422),
    (_json({**ONE, "adapter": "/etc/passwd"}), 422),
    (_json({**ONE, "adapter": "user0\0"}), 422),
    (_json({**ONE, "adapter": "a\nb"}), 422),
    (_json({**ONE, "adapter": "nobody"}), 404),
    (_json(*[ONE] * (MOST_TEXTS + 1)), 413),
    (_json({**ONE, "text": "word " * 3000}), 413),
    (b" " * (BODY + 1), 413),
    (_json({**ONE, "text": "x" * 4 * BODY}), 413),
]


@dataclass
class State:
    """What there is at present, and what has been seen.

    Attributes:
        versions: of each adapter the changes: when, and to which version; None where its file was taken away.
        alone: logits (texts, labels) by adapter and version.
    """

    versions: dict[str, list[tuple[float, int | None]]]
    alone: dict[tuple[str, int], torch.Tensor]
    end: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)

    def between(self, name: str, began: float, ended: float) -> set[int | None]:
        """The versions that were there at some time from `began` to `ended`; what came or went is known later."""
        changes = self.versions[name]
        may_lag = any(version is None for _, version in changes)
        began -= LOOKED if may_lag else 0
        starts = [when for when, _ in changes]
        ends = [*starts[1:], float("inf")]
        return {version for (when, version), stop in zip(changes, ends, strict=True) if when <= ended and stop >= began}

    def note(self, what: str) -> None:
        self.wrong.append(what)
        self.seen["wrong"] += 1


def main(arguments: list[str]) -> None:
    made = parser(__doc__, 1)
    made.add_argument("--model", type=Path, help="an encoder's folder")
    made.add_argument("--minutes", type=float, default=10)
    made.add_argument("--adapters", type=int, default=24)
    made.add_argument("--clients", type=int, default=12)
    options = made.parse_args(arguments)
    require_positive(options, "adapters", "clients")
    if not options.minutes > 0:
        raise ValueError(f"--minutes must be more than 0, not {options.minutes}")
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), model_folder(options.model)
        state = prepare(folder, model, [f"user{number}" for number in range(options.adapters)])
        flags = ("--keep", str(max(1, options.adapters // 2)), "--max_body", str(BODY), "--max_texts", str(MOST_TEXTS))
        with serving(model, folder / "adapters", *flags) as server:
            asyncio.run(soak(state, server, folder, options))
    found = {
        "minutes": options.minutes,
        "adapters": options.adapters,
        "seen": dict(sorted(state.seen.items())),
        "wrong": state.wrong[:20],
        "seconds": {f"p{part}": statistics.quantiles(state.times, n=100)[part - 1] for part in (50, 95, 99)},
        "memory": state.memory,
    }
    report("serving_soak", found, render(found), options.record)
    if state.wrong:
        raise ValueError(f"{len(state.wrong)} wrong, the first: {state.wrong[0]}")


def prepare(folder: Path, model: Path, names: list[str]) -> State:
    """Write all versions of all adapters, put the first ones into the folder, and find out what each answers alone."""
    base, tokenizer = load_model(model), load_tokenizer(model)
    (folder / "adapters").mkdir()
    alone = {}
    for number, name in enumerate(names):
        for version in range(VERSIONS):
            file = version_file(folder, name, version)
            write_adapter(base, file, VERSIONS * number + version)
            alone[name, version] = logits_alone(base, tokenizer, file, TEXTS)
        put(folder, name, 0)
    for name in names:
        if min((alone[name, 0] - alone[name, version]).abs().max() for version in range(1, VERSIONS)) < 100 * CLOSE:
            raise ValueError(f"the versions of {name} cannot be told apart")
    return State({name: [(time.monotonic(), 0)] for name in names}, alone)


def version_file(folder: Path, name: str, version: int) -> Path:
    return folder / f"{name}.{version}"


def put(folder: Path, name: str, version: int) -> None:
    """Replace an adapter's file in one step."""
    temporary = folder / "adapters" / f"{name}.new"
    temporary.write_bytes(version_file(folder, name, version).read_bytes())
    temporary.replace(folder / "adapters" / f"{name}.vblora.safetensors")


# --- what happens at the same time ----------------------------------------------------------------------------------


async def soak(state: State, server: Server, folder: Path, options: Any) -> None:
    state.end = time.monotonic() + 60 * options.minutes
    names = list(state.versions)
    moved = names[-2:]  # these are taken away and come back
    await asyncio.gather(
        *(ask_on(state, server, random.Random(number)) for number in range(options.clients)),
        replace_on(state, folder, names[: len(names) // 2]),
        move_on(state, folder, moved if len(names) > 3 else []),
        hostile_on(state, server),
        hang_up_on(state, server),
        measure_on(state, server),
    )
    await check_counts(state, server)
    await end_in_flight(state, server, names[0])


async def ask_on(state: State, server: Server, chance: random.Random) -> None:
    """Ask, and compare each answer, until the end."""
    client, names = Client(server.port), list(state.versions)
    while time.monotonic() < state.end:
        count = chance.choice((1, 1, 1, 4))
        asked = [(chance.choice(names), chance.randrange(len(TEXTS))) for _ in range(count)]
        began = time.monotonic()
        status, answer = await client.ask(rows([name for name, _ in asked], [TEXTS[text] for _, text in asked]))
        ended = time.monotonic()
        state.seen[f"asked: {status}"] += 1
        there = [state.between(name, began, ended) for name, _ in asked]
        if status == 200:
            state.times.append(ended - began)
            for (name, text), versions, output in zip(asked, there, answer["outputs"], strict=True):
                compare(state, name, text, versions, output)
        elif status != 404 or not any(None in versions for versions in there):
            state.note(f"{asked} was answered with {status}: {answer}")
    client.close()


def compare(state: State, name: str, text: int, versions: set[int | None], output: Any) -> None:
    logits = torch.tensor(output["logits"])
    expected = [state.alone[name, version][text] for version in versions if version is not None]
    state.seen["rows compared"] += 1
    if not any((logits - one).abs().max() < CLOSE * max(1.0, one.abs().max()) for one in expected):
        state.note(f"{name}, text {text}: {logits.tolist()} is none of {[one.tolist() for one in expected]}")
    elif output["label"] != logits.argmax():
        state.note(f"{name}, text {text}: label {output['label']} of {logits.tolist()}")


async def replace_on(state: State, folder: Path, names: list[str]) -> None:
    """Replace an adapter every tenth of a second."""
    chance = random.Random(1)
    while time.monotonic() < state.end:
        name, version = chance.choice(names), chance.randrange(VERSIONS)
        before = time.monotonic()
        put(folder, name, version)
        state.versions[name] = [*state.versions[name], (before, version)][-200:]
        state.seen["replaced"] += 1
        await asyncio.sleep(0.1)


async def move_on(state: State, folder: Path, names: list[str]) -> None:
    """Take adapters away and put them back."""
    for name in names:
        state.versions[name].append((time.monotonic(), 0))
    while names and time.monotonic() < state.end - 2 * LOOKED:
        for name in names:
            state.versions[name].append((time.monotonic(), None))
            (folder / "adapters" / f"{name}.vblora.safetensors").unlink()
            await asyncio.sleep(LOOKED)
            state.versions[name].append((time.monotonic(), 1))
            put(folder, name, 1)
            state.seen["taken away"] += 1
            await asyncio.sleep(LOOKED)
            state.versions[name] = state.versions[name][-20:]


async def hostile_on(state: State, server: Server) -> None:
    """Send what must be refused."""
    client = Client(server.port)
    while time.monotonic() < state.end:
        for body, expected in HOSTILE:
            status, answer = await client.ask(body)
            state.seen[f"hostile: {status}"] += 1
            if status != expected or len(answer["detail"]) > 1000:
                state.note(f"{body[:60]!r} was answered with {status}, not {expected}: {answer}")
            await asyncio.sleep(0.02)
    client.close()


async def hang_up_on(state: State, server: Server) -> None:
    """Clients that go before, within or after their bodies, some after a while, and one that speaks no HTTP."""
    chance = random.Random(2)
    body = rows(["user0"] * 4, TEXTS[:4])
    while time.monotonic() < state.end:
        whole = head(len(body)) + body
        sent = chance.choice((b"", whole[:20], whole[: len(head(len(body)))], whole[:-1], whole, b"\0" * 5000))
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent)
        await asyncio.sleep(chance.choice((0.0, 0.0, 0.02, 0.2)))
        if chance.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
        state.seen["hung up"] += 1
        await asyncio.sleep(0.05)


async def measure_on(state: State, server: Server) -> None:
    """Memory and open files, sixty times in all."""
    began, step = time.monotonic(), max(0.5, (state.end - time.monotonic()) / 60)
    while time.monotonic() < state.end:
        figures = {"bytes": server.resident_bytes(), "files": server.open_files()}
        state.memory.append({"second": round(time.monotonic() - began, 1), **figures})
        await asyncio.sleep(step)


async def check_counts(state: State, server: Server) -> None:
    """Nothing is held when all is answered, and what the server counted is what was seen here."""
    for name in ("vblora_body_bytes", "vblora_waiting_rows"):
        for _ in range(100):
            left = await asyncio.to_thread(server.metric, name)
            if not left:
                break
            await asyncio.sleep(0.1)
        if left:
            state.note(f"{name} is {left} when all is answered")
    for status in (404, 413, 422, 500):
        counted = await asyncio.to_thread(server.metric, f'vblora_requests_total{{status="{status}"}}')
        seen = state.seen[f"asked: {status}"] + state.seen[f"hostile: {status}"]
        if counted != seen:
            state.note(f"{counted:.0f} requests of status {status} are counted, and {seen} were seen")


async def end_in_flight(state: State, server: Server, name: str) -> None:
    """Tell it to stop while requests are in flight."""
    clients = [Client(server.port) for _ in range(8)]
    body = rows([name] * MOST_TEXTS, (TEXTS * MOST_TEXTS)[:MOST_TEXTS])
    asking = [asyncio.create_task(client.ask(body)) for client in clients]
    read, unanswered = 0.0, len(asking)
    while read < unanswered * len(body):  # a request that the server has not read by then is not in flight
        unanswered = sum(not task.done() for task in asking)
        read = await asyncio.to_thread(server.metric, "vblora_body_bytes")
    code = await asyncio.to_thread(server.end)
    statuses = Counter(status for status, _ in await asyncio.gather(*asking))
    state.seen["in flight at the end: 200"] = statuses[200]
    for client in clients:
        client.close()
    if code != 0 or statuses != {200: len(clients)}:
        state.note(f"it ended with {code}, and what was in flight with {dict(statuses)}")


def render(found: dict[str, Any]) -> str:
    memory = [one["bytes"] for one in found["memory"]]
    early, late = (statistics.median(part) for part in (memory[len(memory) // 6 :][:10], memory[-10:]))
    lines = [f"{found['minutes']} minutes, {found['adapters']} adapters", ""]
    lines += [f"{what}: {count:,}" for what, count in found["seen"].items()]
    lines += [
        f"wrong: {len(found['wrong'])}",
        "seconds of an answer: " + ", ".join(f"{part} {value:.2f}" for part, value in found["seconds"].items()),
        f"bytes of the process: {early:,.0f} after a sixth of the time, {late:,.0f} at the end ({late / early:.3f}); "
        f"open files {found['memory'][0]['files']} to {max(one['files'] for one in found['memory'])}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with contextlib.suppress(KeyboardInterrupt):
        commands.run(main, "serving_soak")
