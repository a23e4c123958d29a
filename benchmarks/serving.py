"""`vblora serve` under load: requests per second and their times as the adapters in use grow; beside it PEFT's LoRA.

    python benchmarks/serving.py [--adapters 1024] [--in_use 1 4 16 64 256 1024] [--bound 256] [--peft 64]
                                 [--record results/serving.json]

A small encoder (all-MiniLM-L6-v2, unless --model names another folder) with VB-LoRA of rank 4 on all linear layers and
a head for each adapter. --clients connections each ask for one text by an adapter drawn from those in use, and again
when it is answered. One server keeps all adapters ready, another, where that is fewer, only --bound of them; each is
asked with each number in use, in turns. Figures are medians over the rounds; a ratio is to one adapter in use in the
same round.

Then, without HTTP, batches of --rows rows by four ways in turns: the store, PEFT's mixed batch of the same adapters as
LoRA (`adapter_names`), PEFT's `set_adapter` with the rows of one adapter at a time, and the model with no adapter. The
first three must give the same logits. PEFT has --peft adapters, as it takes long to load more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from serving_client import TEXTS, Client, Server, load_model, load_tokenizer, model_folder, rows, serving, write_adapter
from turns import medians, parser, ratios, report, require_positive, take_turns

from vblora.serving.batcher import Text
from vblora.serving.classifier import Classifier
from vblora_experiments import commands

ASKED_AT_ONCE = 64  # texts of a request that makes adapters ready before the rounds


def main(arguments: list[str]) -> None:
    made = parser(__doc__, 5)
    made.add_argument("--model", type=Path, help="an encoder's folder")
    made.add_argument("--adapters", type=int, default=1024)
    made.add_argument("--in_use", type=int, nargs="+", default=[1, 4, 16, 64, 256, 512, 1024])
    made.add_argument("--bound", type=int, default=256, help="adapters that the second server keeps ready (256)")
    made.add_argument("--requests", type=int, default=256, help="of each turn (256)")
    made.add_argument("--clients", type=int, default=32)
    made.add_argument("--peft", type=int, default=64, help="adapters that PEFT is given (64)")
    made.add_argument("--rows", type=int, default=32, help="of a batch without HTTP (32)")
    options = made.parse_args(arguments)
    require_positive(options, "adapters", "in_use", "bound", "requests", "clients", "peft", "rows", "rounds")
    options.in_use = sorted({1, *(number for number in options.in_use if number <= options.adapters)})
    model = model_folder(options.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = write(model, folder, options.adapters, options.peft)
        found = {
            "settings": {key: getattr(options, key) for key in ("adapters", "bound", "requests", "clients", "peft")},
            "over_http": over_http(model, folder / "adapters", names, options),
            "batches": in_batches(model, folder, names[: options.peft], options),
        }
    report("serving", found, render(found), options.record)


def write(model: Path, folder: Path, adapters: int, as_lora: int) -> list[str]:
    """Packed adapters, and the first of them as plain LoRA too; their names."""
    base, names = load_model(model), [f"user{number}" for number in range(adapters)]
    (folder / "adapters").mkdir()
    for number, name in enumerate(names):
        lora = folder / "lora" / name if number < as_lora else None
        write_adapter(base, folder / "adapters" / f"{name}.vblora.safetensors", number, lora)
    return names


# --- over HTTP ------------------------------------------------------------------------------------------------------


def over_http(model: Path, adapters: Path, names: list[str], options: Any) -> dict[str, Any]:
    """What each server does with each number of adapters in use."""
    bounded = [number for number in options.in_use if number == 1 or number >= options.bound]
    bounded = bounded if options.bound < len(names) else []
    with contextlib.ExitStack() as stack:
        few, servers = f"{options.bound} kept", {}
        for way, keep in {"all kept": len(names), **({few: options.bound} if bounded else {})}.items():
            servers[way] = stack.enter_context(serving(model, adapters, "--keep", str(keep)))
            asyncio.run(make_ready(servers[way], names))
        asked = [("all kept", number) for number in options.in_use] + [(few, number) for number in bounded]
        times: dict[str, list[float]] = {f"{way}, {number}": [] for way, number in asked}
        ways = {
            name: partial(load, servers[way], names[:number], options, times[name], random.Random(number))
            for name, (way, number) in zip(times, asked, strict=True)
        }
        seconds = take_turns(ways, options.rounds, warm_up=0)
        figures = {way: _figures(server) for way, server in servers.items()}
    return {"servers": figures, "ways": _of(seconds, times, "all kept, 1", options)}


def _figures(server: Server) -> dict[str, float]:
    """What a server took in all of its rounds; it ends."""
    found = {
        "bytes": server.metric("vblora_adapter_bytes"),
        "resident_bytes": server.resident_bytes(),
        "seconds_to_ready": server.seconds_to_ready,
        "rows_of_a_batch": server.metric("vblora_batch_rows_sum") / server.metric("vblora_batch_rows_count"),
    }
    if server.end() != 0:
        raise ValueError("a server did not end well")
    return found


def _of(seconds: Any, times: dict[str, list[float]], one: str, options: Any) -> dict[str, Any]:
    """Requests per second by way, against one adapter in the same rounds, and the requests' times in milliseconds."""
    slower = ratios(seconds, one)
    return {
        way: {
            "requests_per_second": options.requests / taken,
            "of_one_adapter": 1 / slower[way],
            **{f"p{part}_ms": 1000 * percentile(times[way], part) for part in (50, 95, 99)},
        }
        for way, taken in medians(seconds).items()
    }


def percentile(values: list[float], part: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[part - 1]


async def make_ready(server: Server, names: list[str]) -> None:
    """Ask for every adapter once, the first last."""
    client, backwards = Client(server.port), names[::-1]
    for start in range(0, len(names), ASKED_AT_ONCE):
        part = backwards[start : start + ASKED_AT_ONCE]
        if (await client.ask(rows(part, [TEXTS[0]] * len(part))))[0] != 200:
            raise ValueError("a request was not answered")
    client.close()


def load(server: Server, names: list[str], options: Any, times: list[float], chance: random.Random) -> float:
    """Seconds that so many requests take; each one's own are added to `times`."""
    bodies = [rows([chance.choice(names)], [chance.choice(TEXTS)]) for _ in range(options.requests)]

    async def one_client() -> None:
        client = Client(server.port)
        while bodies:
            body, began = bodies.pop(), time.perf_counter()
            status, _ = await client.ask(body)
            if status != 200:
                raise ValueError(f"a request was answered with {status}")
            times.append(time.perf_counter() - began)
        client.close()

    async def all_clients() -> None:
        await asyncio.gather(*(one_client() for _ in range(options.clients)))

    began = time.perf_counter()
    asyncio.run(all_clients())
    return time.perf_counter() - began


# --- without HTTP ---------------------------------------------------------------------------------------------------


def in_batches(model: Path, folder: Path, names: list[str], options: Any) -> dict[str, Any]:
    """Rows per second of each way, for as many adapters in a batch as there may be."""
    classifier = Classifier.load(str(model), folder / "adapters", max_composed=len(names))
    wrapped = peft.PeftModel.from_pretrained(load_model(model), str(folder / "lora" / names[0]), names[0]).eval()
    began = time.perf_counter()
    for name in names[1:]:
        wrapped.load_adapter(str(folder / "lora" / name), adapter_name=name)
    opened = (len(names) - 1) / (time.perf_counter() - began) if names[1:] else None
    plain, tokenizer = load_model(model), load_tokenizer(model)
    found: dict[str, Any] = {"opened_per_second_in_peft": opened, "adapters": {}}
    for number in [number for number in options.in_use if number <= min(len(names), options.rows)]:
        asked = [names[row % number] for row in range(options.rows)]
        texts = [TEXTS[row % len(TEXTS)] for row in range(options.rows)]
        ways = _ways(classifier, wrapped, plain, tokenizer, asked, texts)
        logits = {way: run() for way, run in ways.items()}
        for way in ("PEFT, mixed batch", "PEFT, set_adapter"):
            if not torch.allclose(logits[way], logits["store"], atol=1e-3):
                raise ValueError(f"{way} gives other logits than the store")
        seconds = take_turns({way: partial(_timed, run) for way, run in ways.items()}, options.rounds)
        found["adapters"][str(number)] = {
            "rows_per_second": {way: options.rows / taken for way, taken in medians(seconds).items()},
            "times_the_store": ratios(seconds, "store"),
        }
    return found


def _ways(
    classifier: Classifier, wrapped: Any, plain: Any, tokenizer: Any, asked: list[str], texts: list[str]
) -> dict[str, Callable[[], torch.Tensor]]:
    tokens = classifier.tokenize([Text(name, text) for name, text in zip(asked, texts, strict=True)])
    batch = tokenizer(texts, padding=True, return_tensors="pt")

    def by_store() -> torch.Tensor:
        return torch.tensor(classifier.run(asked, tokens))

    @torch.no_grad()
    def mixed() -> torch.Tensor:
        return wrapped(**batch, adapter_names=asked).logits

    @torch.no_grad()
    def switched() -> torch.Tensor:
        logits = torch.empty(len(asked), plain.config.num_labels)
        for name in dict.fromkeys(asked):
            wrapped.set_adapter(name)
            mine = [row for row, other in enumerate(asked) if other == name]
            logits[mine] = wrapped(**{key: value[mine] for key, value in batch.items()}).logits
        return logits

    @torch.no_grad()
    def without() -> torch.Tensor:
        return plain(**batch).logits

    return {"store": by_store, "PEFT, mixed batch": mixed, "PEFT, set_adapter": switched, "no adapter": without}


def _timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


# --- what is printed ------------------------------------------------------------------------------------------------


def render(found: dict[str, Any]) -> str:
    http, batches = found["over_http"], found["batches"]
    lines = [
        "| server, adapters in use | requests per second | of one adapter's | p50, ms | p95, ms | p99, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for way, of in http["ways"].items():
        times = " | ".join(f"{of[f'p{part}_ms']:.0f}" for part in (50, 95, 99))
        lines.append(f"| {way} | {of['requests_per_second']:.1f} | {of['of_one_adapter']:.2f} | {times} |")
    lines.append("")
    for way, of in http["servers"].items():
        lines.append(
            f"{way}: {of['bytes']:,.0f} bytes of adapters, {of['resident_bytes']:,} of the process; ready after "
            f"{of['seconds_to_ready']:.0f} s; {of['rows_of_a_batch']:.1f} rows in a batch."
        )
    ways = ("store", "PEFT, mixed batch", "PEFT, set_adapter", "no adapter")
    lines += ["", f"| adapters in a batch | {' | '.join(f'{way}, rows per second' for way in ways)} | store / mixed |"]
    lines.append(f"|---:{'|---:' * len(ways)}|---:|")
    for number, of in batches["adapters"].items():
        speeds = " | ".join(f"{of['rows_per_second'][way]:.1f}" for way in ways)
        lines.append(f"| {number} | {speeds} | {of['times_the_store']['PEFT, mixed batch']:.2f} |")
    if batches["opened_per_second_in_peft"]:
        lines += ["", f"PEFT loaded {batches['opened_per_second_in_peft']:.1f} adapters per second."]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    commands.run(main, "serving")
