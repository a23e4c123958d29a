"""Packed adapters by name from vLLM's OpenAI-compatible server, each token compared with our own: serve_demo.sh.

A Llama of two layers and a few packed adapters are made from nothing. Then the server is asked for each adapter by its
name, first one after another, then all at once, and for names that must not be found. The exit code is 0 only when
every answer was as it must be.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import vblora

WORDS = (
    "the a one every old young red blue green tall small quiet loud cat dog bird fox horse child king queen baker "
    "sailor sings sees likes finds takes gives calls follows waits runs sleeps in on under over near with and but or "
    "then house river garden forest market ship bread apple song letter stone door night morning today again never"
)
PROMPTS = ("the old cat sees", "every child in the garden", "then a red bird and")
NAMES = ("alice", "bob", "carol", "dave", "erin")
TOKENS = 16  # of an answer
LOADED = 2  # adapters that vLLM keeps in memory: fewer than there are, so that some are read again
REFUSED = (
    "nobody",
    "../alice",
    "..",
    "/etc/passwd",
    ".hidden",
    "alice/../bob",
    "broken",
    "other-model",
    "narrow",
    "a" * 300,
)


def main() -> int:
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="vblora-serve-") as name:
        folder = Path(name)
        make_model(folder / "model")
        ours = {adapter: answers(folder, seed, adapter) for seed, adapter in enumerate((None, *NAMES))}
        make_refused(folder)
        with server(folder) as ask:
            good = all([one_by_one(ask, folder, ours), at_once(ask, ours), refused(ask)])
            status, _ = ask(NAMES[0], PROMPTS[0])
            print(f"after all that the server answers {NAMES[0]} with {status}")
            good = good and status == 200
    print("all agree" if good else "NOT all as it must be")
    return 0 if good else 1


# --- the model, the adapters and our own answers ---------------------------------------------------------------------


def make_model(folder: Path) -> None:
    """A random Llama of two layers that speaks a few words."""
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *WORDS.split()])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # 32 wide: vLLM's kernels for the CPU take no head of 16
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(settings).save_pretrained(folder)


def answers(folder: Path, seed: int, adapter: str | None) -> list[list[int]]:
    """Our tokens for each prompt, with a new adapter of this name that is packed for the server; without for None."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if adapter is not None:
        config = vblora.VBLoRAConfig(
            r=4, num_vectors=16, vector_length=32, target_modules="all-linear", init_vector_bank_bound=0.6
        )
        vblora.attach(model, config, seed=seed).pack(str(folder / "adapters" / f"{adapter}.vblora.safetensors"))
    return [greedy(model, tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def make_refused(folder: Path) -> None:
    """Files that are there and must not be served: cut short, hidden, for another model, and for narrower layers."""
    adapters = folder / "adapters"
    whole = (adapters / "alice.vblora.safetensors").read_bytes()
    (adapters / "broken.vblora.safetensors").write_bytes(whole[:-20])
    (adapters / ".hidden.vblora.safetensors").write_bytes(whole)
    settings = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    for name, base in {"other-model": "some/other-model", "narrow": str(folder / "model")}.items():
        model = LlamaForCausalLM(settings)
        model.config._name_or_path = base
        config = vblora.VBLoRAConfig(vector_length=8, target_modules=["q_proj"])
        vblora.attach(model, config, seed=0).pack(str(adapters / f"{name}.vblora.safetensors"))


# --- the server ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Any]:
    """vLLM's server, ready; what it gives is a function of a model's name and a prompt."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    model = str(folder / "model")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    command += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", str(LOADED), "--max-cpu-loras", str(LOADED)]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VBLORA_ADAPTERS": str(folder / "adapters"),
        "VBLORA_CACHE": str(folder / "cache"),
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        print(f"starting vLLM on port {port} ...", flush=True)
        wait(process, port)
        yield lambda name, prompt: complete(port, name, prompt)
    except OSError as error:
        end = (folder / "log").read_text(errors="replace")[-4000:]
        raise SystemExit(
            f"{end}\n\nserve_demo: error: vLLM has failed ({error}); above is the end of its log"
        ) from error
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server; its engine, a process of the same group, ends with it or is made to."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(process: subprocess.Popen[bytes], port: int, seconds: int = 300) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            if time.monotonic() > end or process.poll() is not None:
                raise
            time.sleep(1)


def complete(port: int, name: str, prompt: str) -> tuple[int, list[int]]:
    """The answer's status and its tokens."""
    body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({**body, "return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)["choices"][0]["token_ids"]
    except urllib.error.HTTPError as error:
        return error.code, []


# --- what is asked for -----------------------------------------------------------------------------------------------


def one_by_one(ask: Any, folder: Path, ours: dict[str | None, list[list[int]]]) -> bool:
    """Each adapter and the base model, prompt by prompt, as a table."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    print(f"\n{'asked for':<14}{'equal tokens':<14}{PROMPTS[0]} ...")
    good = True
    for adapter, expected in ours.items():
        found = [ask(adapter or str(folder / "model"), prompt)[1] for prompt in PROMPTS]
        equal = sum(map(operator.eq, chain(*found), chain(*expected)))
        good = good and found == expected
        text = tokenizer.decode(found[0][:7]) if found[0] else "(no answer)"
        print(f"{adapter or '(base model)':<14}{f'{equal}/{len(PROMPTS) * TOKENS}':<14}{text}")
    different = {tuple(map(tuple, expected)) for expected in ours.values()}
    return good and len(different) == len(ours)


def at_once(ask: Any, ours: dict[str | None, list[list[int]]]) -> bool:
    """All adapters twice at the same time, so that batches have several in them.

    Without the base model: in such a batch vLLM 0.32 gives its rows an adapter on the CPU (vllm-project/vllm#48421).
    """
    asked = [(adapter, number) for _ in range(2) for adapter in NAMES for number in range(len(PROMPTS))]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: ask(one[0], PROMPTS[one[1]])[1], asked))
    equal = sum(tokens == ours[adapter][number] for tokens, (adapter, number) in zip(found, asked, strict=True))
    print(f"\n{equal} of {len(asked)} answers equal when adapters are asked for at the same time")
    return equal == len(asked)


def refused(ask: Any) -> bool:
    statuses = {name: ask(name, PROMPTS[0])[0] for name in REFUSED}
    print("\nrefused:", ", ".join(f"{name[:15]} {status}" for name, status in statuses.items()))
    return all(status in (400, 404) for status in statuses.values())


if __name__ == "__main__":
    raise SystemExit(main())
