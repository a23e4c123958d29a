"""Many adapters at once: `vblora.AdapterStore` beside PEFT, for as many adapters as the batch has rows.

    python benchmarks/many_adapters.py [--model DIR] [--adapters 32] [--record results/many_adapters.json]

Tokens per second of greedy generation with every row its own adapter, by three ways that take turns: the store (packed
VB-LoRA, rank 4), PEFT's mixed batch of the same adapters as plain LoRA (`adapter_names`), and PEFT's `set_adapter`
with one row at a time. Also the bytes an adapter takes while it waits, and how many are opened in a second (from the
file to factors). Without --model a Llama of 8 layers, 512 wide, with random weights. The ways must give the same texts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from turns import report, require_positive, timed

import vblora
from vblora_experiments import commands

PROMPT, NEW = 16, 16  # tokens of a row: given, and generated
BATCHES = (1, 8, 32)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal model's folder")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="each way is timed so often; the median counts")
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    require_positive(options, "adapters", "rounds")
    with tempfile.TemporaryDirectory() as folder:
        names = [f"a{number}" for number in range(options.adapters)]
        write_adapters(options.model, names, Path(folder))
        results = measure(options.model, names, Path(folder), options.rounds)
    report("many_adapters", results, render(results), options.record)


def base_model(folder: str | None) -> Any:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    size = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4096, pad_token_id=0, **size)).to(device).eval()


def write_adapters(model: str | None, names: list[str], folder: Path) -> None:
    """The same adapters as packed files and as PEFT's LoRA directories; no two are alike."""
    adapted = base_model(model)
    width = 64 if adapted.config.hidden_size % 256 else 256
    config = vblora.VBLoRAConfig(
        r=4, num_vectors=90, vector_length=width, topk=2, init_vector_bank_bound=0.2, target_modules="all-linear"
    )
    for number, name in enumerate(names):
        adapter = vblora.attach(adapted, config, seed=number)
        adapter.pack(folder / f"{name}.safetensors", bank="float32", weights="lossless")
        adapter.export_lora(folder / name)
        adapter.detach()


@torch.no_grad()
def measure(model: str | None, names: list[str], folder: Path, rounds: int) -> dict[str, Any]:
    store = vblora.AdapterStore(base_model(model), folder, max_composed=len(names))
    opened = {"store": timed(lambda: _use(store, names))}
    wrapped = peft.PeftModel.from_pretrained(base_model(model), str(folder / names[0]), adapter_name=names[0]).eval()

    def open_others() -> None:
        for name in names[1:]:
            wrapped.load_adapter(str(folder / name), adapter_name=name)

    opened["PEFT"] = timed(open_others) / max(1, len(names) - 1) * len(names)
    packed = sum((folder / f"{name}.safetensors").stat().st_size for name in names)
    lora = sum(p.numel() * p.element_size() for n, p in wrapped.named_parameters() if "lora_" in n)
    return {
        "adapters": len(names),
        "waiting_bytes": {"store": packed / len(names), "PEFT": lora / len(names)},
        "opened_per_second": {way: len(names) / seconds for way, seconds in opened.items()},
        "tokens_per_second": {
            str(batch): speeds(store, wrapped, names[:batch], rounds) for batch in BATCHES if batch <= len(names)
        },
    }


def _use(store: vblora.AdapterStore, names: list[str]) -> None:
    with store.rows(names):
        pass


def speeds(store: vblora.AdapterStore, wrapped: Any, names: list[str], rounds: int) -> dict[str, float]:
    """Generated tokens per second of each way.

    Raises:
        ValueError: the ways generate different texts.
    """
    torch.manual_seed(1)
    ids = torch.randint(3, store.model.config.vocab_size, (len(names), PROMPT)).to(store.model.device)

    def generate(model: Any, rows: torch.Tensor, **more: Any) -> torch.Tensor:
        how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        return model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **how, **more)

    def by_store() -> torch.Tensor:
        with store.rows(names):
            return generate(store.model, ids)

    def mixed() -> torch.Tensor:
        return generate(wrapped, ids, adapter_names=names)

    def swapped() -> torch.Tensor:
        texts = []
        for row, name in enumerate(names):
            wrapped.set_adapter(name)
            texts.append(generate(wrapped, ids[row : row + 1]))
        return torch.cat(texts)

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "store": by_store,
        "PEFT, mixed batch": mixed,
        "PEFT, one row at a time": swapped,
    }
    texts = [way() for way in ways.values()]  # to warm up
    if not all(torch.equal(text, texts[0]) for text in texts):
        raise ValueError("the ways generate different texts")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    return {name: len(names) * NEW / statistics.median(taken) for name, taken in seconds.items()}


def render(results: dict[str, Any]) -> str:
    waiting, opened = results["waiting_bytes"], results["opened_per_second"]
    lines = ["| rows, each its own adapter | way | tokens per second | times the mixed batch |", "|---:|---|---:|---:|"]
    for batch, found in results["tokens_per_second"].items():
        mixed = found["PEFT, mixed batch"]
        lines += [f"| {batch} | {way} | {speed:.1f} | {speed / mixed:.2f} |" for way, speed in found.items()]
    lines += [
        "",
        f"{results['adapters']} adapters. One takes {waiting['store']:,.0f} bytes packed, {waiting['PEFT']:,.0f} as "
        f"LoRA in PEFT; opened per second: {opened['store']:.1f} and {opened['PEFT']:.1f}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    commands.run(main, "many_adapters")
