"""GRPO with a reward that a program checks, and the bytes that a sampler is sent after each step.

    python benchmarks/grpo.py --model DIR [--steps 30] [--record results/grpo_smollm2.json]

The task: sums of two numbers below 100, after one that is written out. The reward is 1 where the first number of the
completion is the sum and no letter follows, 0.25 where only the number is right, 0 else. TRL's GRPOTrainer trains
VB-LoRA by the recipe, with `AdapterTraining` and `BaseReference`, and PEFT's LoRA of the same rank. Before and after
stand the mean reward of sampled completions of sums that are not trained on, and the share of right numbers.

Bytes of one weight synchronisation, each measured by writing it: what changes in VB-LoRA's packed file (at k = 1 the
bank alone, as a selection of one vector never moves), the whole packed file, LoRA's file, and the merged model in
bfloat16, as TRL sends it to vLLM.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import vblora
from vblora.files import packed
from vblora.integrations import AdapterTraining, BaseReference
from vblora.io import write_json
from vblora_experiments import commands
from vblora_experiments.records import environment

RANK = 4
TOKENS = 8  # of a completion


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal model")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt, and rows of a step")
    parser.add_argument("--lora_rate", type=float, default=5e-4, help="LoRA's; the bank's is twice as high")
    parser.add_argument("--beta", type=float, default=0.02, help="weight of the distance from the reference")
    parser.add_argument("--held_out", type=int, default=64, help="sums to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    rows = sums(options.steps + options.held_out, options.seed)
    start = time.process_time()
    found = {"VB-LoRA": of_vblora(options, rows), f"LoRA r {RANK}": of_lora(options, rows)}
    settings = ("steps", "group", "lora_rate", "beta", "held_out", "seed")
    record = {
        "model": options.model.name,
        "settings": {key: getattr(options, key) for key in settings},
        "methods": found,
        "processor_seconds": time.process_time() - start,
    }
    printed = render(found)
    print("\n".join(printed))
    if options.record:
        write_json(options.record, {"benchmark": "grpo", **record, "printed": printed, **environment()})


def of_vblora(options: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """VB-LoRA by the recipe."""

    class Trainer(AdapterTraining, BaseReference, trl.GRPOTrainer): ...

    model, tokenizer = loaded(options)
    chosen = vblora.recipe(model, "all-linear", r=RANK, lora_rate=options.lora_rate)
    adapter = vblora.attach(model, chosen.config, seed=options.seed)
    found = before_and_after(model, tokenizer, rows, options, partial(Trainer, rates=chosen.rates))
    bank = adapter.content().tensors["vector_bank"]
    sent = {"the bank": bank.numel() * bank.element_size(), "packed": len(packed.dumps(adapter))}
    own = {id(parameter) for parameter in adapter.parameters()}
    sent["the merged model in bfloat16"] = sum(2 * p.numel() for p in model.parameters() if id(p) not in own)
    return {**found, "config": chosen.config.to_dict(), "rates": chosen.rates, "sync_bytes": sent}


def of_lora(options: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """PEFT's LoRA of the same rank on the same layers, whose reference TRL makes itself."""
    model, tokenizer = loaded(options)
    torch.manual_seed(options.seed)
    settings = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    found = before_and_after(adapted, tokenizer, rows, options, trl.GRPOTrainer)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        size = Path(folder, "adapter_model.safetensors").stat().st_size
    return {**found, "config": settings, "sync_bytes": {"the file": size}}


def loaded(options: Any) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), tokenizer


def before_and_after(model: Any, tokenizer: Any, rows: list[dict[str, Any]], options: Any, trainer: Any) -> Any:
    """Train on the first rows, and measure on the others before and after. Both methods start as the base model."""
    train, held_out = rows[: options.steps], rows[options.steps :]
    before = measured(model, tokenizer, held_out, options.seed)
    log = trained(model, tokenizer, train, trainer, options)
    return {"before": before, "log": log, "after": measured(model, tokenizer, held_out, options.seed)}


def sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts, all different, with their answers."""
    pairs = random.Random(seed).sample([(a, b) for a in range(10, 100) for b in range(10, 100)], count)
    return [{"prompt": f"12 + 31 = 43\n{a} + {b} =", "answer": a + b} for a, b in pairs]


def reward(completions: list[str], answer: list[int], **_: Any) -> list[float]:
    """See above."""
    found = []
    for text, wanted in zip(completions, answer, strict=True):
        number = re.match(r"\s*(\d+)", text)
        right = number is not None and int(number[1]) == wanted
        found.append(0.0 if not right else 0.25 if re.search("[A-Za-z]", text) else 1.0)
    return found


def trained(model: Any, tokenizer: Any, rows: list[dict[str, Any]], make: Any, options: Any) -> list[dict[str, Any]]:
    """Train, and give TRL's log."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            folder,
            per_device_train_batch_size=options.group,
            num_generations=options.group,
            max_completion_length=TOKENS,
            max_steps=options.steps,
            learning_rate=options.lora_rate,
            warmup_steps=round(0.06 * options.steps),
            beta=options.beta,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            seed=options.seed,
        )
        trainer = make(model, reward, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
        kept = ("step", "reward", "kl", "loss", "grad_norm", "entropy")
        logs = [entry for entry in trainer.state.log_history if "reward" in entry]
        return [{key: entry[key] for key in kept if key in entry} for entry in logs]


@torch.no_grad()
def measured(model: Any, tokenizer: Any, rows: list[dict[str, Any]], seed: int) -> dict[str, float]:
    """The mean reward of one sampled completion of each prompt, and the share of right numbers."""
    torch.manual_seed(seed)
    model.eval()
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True).to(model.device)
    settings = {"max_new_tokens": TOKENS, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    ids = model.generate(**batch, **settings, pad_token_id=tokenizer.pad_token_id)[:, batch["input_ids"].shape[1] :]
    found = reward(tokenizer.batch_decode(ids, skip_special_tokens=True), [row["answer"] for row in rows])
    return {"reward": sum(found) / len(found), "right": sum(one > 0 for one in found) / len(found)}


def render(methods: dict[str, Any]) -> list[str]:
    """The figures for reading, in Markdown."""
    lines = ["| | mean reward, before | after | right numbers, before | after |", "|---|---:|---:|---:|---:|"]
    for name, found in methods.items():
        one, other = found["before"], found["after"]
        lines.append(
            f"| {name} | {one['reward']:.3f} | {other['reward']:.3f} | {one['right']:.1%} | {other['right']:.1%} |"
        )
    lines += ["", "| sent after a step | bytes | of LoRA's |", "|---|---:|---:|"]
    sizes = [(f"{name}, {what}", size) for name, of in methods.items() for what, size in of["sync_bytes"].items()]
    of_lora = next(size for name, size in sizes if name.startswith("LoRA"))
    sizes.sort(key=lambda item: item[1])
    lines += [f"| {name} | {size:,} | {size / of_lora:.3g} |" for name, size in sizes]
    return lines


if __name__ == "__main__":
    commands.run(main, "grpo")
