"""Packed adapters by name in vLLM, beside the same adapters as LoRA directories: time to the first token, and bytes.

    DIR/bin/python benchmarks/vllm_adapters.py [--model DIR] [--adapters 16 64] [--record results/vllm_adapters.json]

Runs with a Python that has vLLM (scripts/serve_demo.sh makes .venv-vllm with its CPU build). Two servers: one finds
packed adapters by this project's resolver, which expands each when it is first asked for, the other LoRA directories by
vLLM's own. Both keep --kept adapters in memory. For each number of adapters each is asked for once (cold), and then
--asked times one at random (warm: some have fallen out of memory where there are more than are kept). The servers take
turns request by request, one request at a time of one token. The first tokens must be the same.

Without --model a Llama of 8 layers, 512 wide, with random weights; VB-LoRA of rank 4 on all linear layers.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from turns import parser, report, require_positive

import vblora
from vblora_experiments import commands

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from serve_demo import make_model, stop, wait

PROMPT = "the old cat sees every child in the garden then a red bird and a fox in the river"
WAYS = ("packed", "LoRA directories")


def main(arguments: list[str]) -> None:
    made = parser(__doc__, 1)
    made.add_argument("--model", type=Path, help="a causal model's folder, with its tokenizer")
    made.add_argument("--adapters", type=int, nargs="+", default=[16, 64])
    made.add_argument("--asked", type=int, default=64, help="random requests for each number of adapters (64)")
    made.add_argument("--kept", type=int, default=16, help="adapters that vLLM keeps in memory (16)")
    options = made.parse_args(arguments)
    require_positive(options, "adapters", "asked", "kept")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model.resolve() if options.model else random_model(folder / "model")
        names = [f"user{number}" for number in range(max(options.adapters))]
        size = write(model, folder, names)
        with server(folder, model, WAYS[0], options.kept) as one, server(folder, model, WAYS[1], options.kept) as other:
            found = measure({WAYS[0]: one, WAYS[1]: other}, names, options)
    found = {"model": model.name if options.model else "random Llama", "kept": options.kept, "bytes": size, **found}
    report("vllm_adapters", found, render(found), options.record)


def random_model(folder: Path) -> Path:
    """A larger model with the tokenizer of scripts/serve_demo.py."""
    make_model(folder)
    small = LlamaConfig.from_pretrained(folder)
    size = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**small.to_dict(), **size, "head_dim": 64})).save_pretrained(folder)
    return folder


def write(model: Path, folder: Path, names: list[str]) -> dict[str, float]:
    """Each adapter packed and as LoRA; the bytes of one."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = vblora.VBLoRAConfig(
        r=4, num_vectors=90, vector_length=64, topk=2, init_vector_bank_bound=0.2, target_modules="all-linear"
    )
    for number, name in enumerate(names):
        adapter = vblora.attach(base, config, seed=number)
        adapter.pack(folder / "packed" / f"{name}.vblora.safetensors")
        adapter.export_lora(folder / "lora" / name)
        adapter.detach()
    packed = [path.stat().st_size for path in (folder / "packed").iterdir()]
    lora = [path.stat().st_size for path in (folder / "lora").glob("*/*")]
    return {WAYS[0]: sum(packed) / len(names), WAYS[1]: sum(lora) / len(names)}


@contextlib.contextmanager
def server(folder: Path, model: Path, way: str, kept: int) -> Iterator[int]:
    """vLLM's server, ready; its port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    command += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "4", "--max-cpu-loras", str(kept)]
    own = {
        WAYS[0]: {
            "VLLM_PLUGINS": "vblora_resolver",
            "VBLORA_ADAPTERS": str(folder / "packed"),
            "VBLORA_CACHE": str(folder / "cache"),
        },
        WAYS[1]: {
            "VLLM_PLUGINS": "lora_filesystem_resolver",
            "VLLM_LORA_RESOLVER_CACHE_DIR": str(folder / "lora"),
        },
    }[way]
    usual = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = {**usual, **os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **own}
    with (folder / f"log of {way}").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait(process, port, 900)
        yield port
    except OSError as error:
        raise ValueError(f"vLLM has failed ({error}): {(folder / f'log of {way}').read_text()[-2000:]}") from error
    finally:
        stop(process)


def measure(ports: dict[str, int], names: list[str], options: Any) -> dict[str, Any]:
    """Milliseconds to the first token, cold and warm, for each number of adapters."""
    chance, found, seen = random.Random(0), {}, 0
    for count in sorted(options.adapters):
        orders = {
            "cold": names[seen:count],
            "warm": [chance.choice(names[:count]) for _ in range(options.asked)],
        }
        seen = count
        found[str(count)] = {state: asked_for(ports, order) for state, order in orders.items() if order}
    return {"milliseconds": found}


def asked_for(ports: dict[str, int], order: list[str]) -> dict[str, dict[str, float]]:
    """Each way's milliseconds to the first token, over these requests.

    Raises:
        ValueError: the ways give different tokens.
    """
    taken: dict[str, list[float]] = {way: [] for way in ports}
    for turn, name in enumerate(order):
        tokens = {}
        for way in list(ports)[:: 1 if turn % 2 else -1]:  # neither is always the first
            began = time.perf_counter()
            tokens[way] = first_token(ports[way], name)
            taken[way].append(1000 * (time.perf_counter() - began))
        if len({tuple(token) for token in tokens.values()}) != 1:
            raise ValueError(f"{name}: other tokens, {tokens}")
    return {way: {"median": statistics.median(ms), "worst": max(ms), "requests": len(ms)} for way, ms in taken.items()}


def first_token(port: int, name: str) -> list[int]:
    body = {"model": name, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({**body, "return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def render(found: dict[str, Any]) -> str:
    lines = ["| adapters | | packed, ms | LoRA directories, ms | packed / LoRA |", "|---:|---|---:|---:|---:|"]
    for count, states in found["milliseconds"].items():
        for state, of in states.items():
            one, other = (of[way]["median"] for way in WAYS)
            lines.append(f"| {count} | {state} | {one:.0f} | {other:.0f} | {one / other:.2f} |")
    one, other = (found["bytes"][way] for way in WAYS)
    lines += ["", f"Medians to the first token. An adapter has {one:,.0f} bytes packed, {other:,.0f} as LoRA."]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    commands.run(main, "vllm_adapters")
