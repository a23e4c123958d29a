"""Bytes that two processes exchange in one training step: VB-LoRA here, PEFT's VB-LoRA, PEFT's LoRA of the same rank.

    python benchmarks/exchange.py [--layers 12] [--width 768] [--num_vectors 2048] [--steps 5] [--record FILE]

DistributedDataParallel on two gloo processes of this machine, with its defaults and, for VB-LoRA here, without its
sending of buffers. Bytes are those that one process hands over: its gradients, counted in a communication hook, and the
buffers that DDP sends from the first process to the others before a forward pass. Beside them the largest difference,
after all steps, of a trained number from training in one process with both processes' rows (in float32 and float64),
and what the same counts give at Llama2-7B's shape.

Last result (results/speed/exchange*.json): 8.3% of PEFT's bytes by default, 0.31% with --width 512 --vector_length 32.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from step_time import DECODER, HERE, LORA, PEFT, WAYS, Shape, step
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from turns import report, require_positive

from vblora.shapes import LayerShape, sub_vectors
from vblora_experiments import commands

WORLD, BATCH, LENGTH, VOCABULARY = 2, 1, 32, 256  # rows of one process and step, and their tokens
R, K = 4, 2  # of the ways in step_time.py
QUIET = f"{HERE}, forward_sync_buffers=False"  # they follow from what is trained, and are the same in every process
COMPARED = (LORA, PEFT, HERE, QUIET)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
GOAL_BYTES, GOAL_DIFFERENCE = 0.01, 1e-5
ATTENTION, MLP = DECODER[:4], DECODER[4:6]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--num_vectors", type=int, default=2048, help="h")
    parser.add_argument("--vector_length", type=int, default=256, help="b; it must divide the width (PEFT)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    require_positive(options, "layers", "width", "num_vectors", "vector_length", "steps")
    if options.width % options.vector_length:
        raise ValueError(f"--width {options.width} must be a multiple of --vector_length {options.vector_length}")
    results = measure(options)
    report("exchange", results, render(results), options.record)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(process, (folder, options), nprocs=WORLD)
        found = {way: compare(way, Path(folder), options) for way in COMPARED}
    shapes = llama_shapes(options.layers, options.width, inner(options.width))
    h, b = options.num_vectors, options.vector_length
    return {
        "shape": {name: getattr(options, name) for name in ("layers", "width", "num_vectors", "vector_length")},
        "steps": options.steps,
        "ways": found,
        "counted": counted(shapes, h, b),
        "llama2_7b": counted(llama_shapes(32, 4096, 11008), 2048, 256),
    }


def inner(width: int) -> int:
    """Width of the feed-forward part: a multiple of every vector length that divides `width`."""
    return 3 * width


def llama_shapes(layers: int, width: int, between: int) -> list[LayerShape]:
    """The adapted layers of a Llama whose keys and values are as wide as its queries."""
    block = [LayerShape(name, width, width) for name in ATTENTION]
    block += [LayerShape(name, width, between) for name in MLP]
    return [*block, LayerShape("down_proj", between, width)] * layers


def counted(shapes: list[LayerShape], h: int, b: int) -> dict[str, int]:
    """Bytes of the gradients of a step in float32, from the shapes alone."""
    n = sub_vectors(shapes, R, b)
    numbers = {
        LORA: sum(R * (shape.in_features + shape.out_features) for shape in shapes),
        PEFT: n * h + h * b,
        HERE: n * K + h * b,
        QUIET: n * K + h * b,
    }
    return {way: 4 * count for way, count in numbers.items()}


# ------------------------------------------------------------------------------------------ training


def process(rank: int, folder: str, options: argparse.Namespace) -> None:
    """Every way and precision, in one pair of processes."""
    os.environ |= {"MASTER_ADDR": "localhost", "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    limit = datetime.timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=limit)
    for way in COMPARED:
        for dtype in DTYPES:
            torch.save(train(way, dtype, rank, options), Path(folder) / f"{way}_{dtype}_{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # not by way of the interpreter's end, in which gloo's threads have been seen to wait for ever


def train(way: str, dtype: str, rank: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """What is trained after all steps, by one process of several or (rank None) by one with all rows."""
    torch.set_default_dtype(DTYPES[dtype])
    model, optimizer = WAYS[HERE if way == QUIET else way](*build(options))
    parallel, meter = model, None
    if rank is not None:
        parallel = DistributedDataParallel(model, forward_sync_buffers=way != QUIET)
        meter = Meter(parallel)
    for rows in batches(options.steps):
        own = rows if rank is None else rows[rank * BATCH : (rank + 1) * BATCH]
        step(parallel, optimizer, own, own, 1)
    trained = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    torch.set_default_dtype(torch.float32)
    return {"trained": trained, "bytes": meter.per_step(options.steps) if meter else {}}


def build(options: argparse.Namespace) -> tuple[nn.Module, Shape]:
    torch.manual_seed(0)
    heads = max(1, options.width // 64)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=inner(options.width),
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    bank = {"num_vectors": options.num_vectors, "vector_length": options.vector_length}
    return LlamaForCausalLM(config), Shape(lambda: nn.Identity(), DECODER, bank, BATCH, LENGTH)


def batches(steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randint(3, VOCABULARY, (WORLD * BATCH, LENGTH), generator=generator)


class Meter:
    """Counts what DDP exchanges: gradients in a communication hook, buffers where they are sent."""

    def __init__(self, parallel: DistributedDataParallel) -> None:
        self.gradients = self.buffers = 0
        parallel.register_comm_hook(None, self._exchange)
        self._send = parallel._distributed_broadcast_coalesced
        parallel._distributed_broadcast_coalesced = self._sent  # type: ignore[method-assign]

    def per_step(self, steps: int) -> dict[str, float]:
        return {"gradients": self.gradients / steps, "buffers": self.buffers / steps}

    def _exchange(self, _, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are text
        self.gradients += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

    def _sent(self, tensors: list[Tensor], *others: Any, **named: Any) -> None:
        self.buffers += sum(t.nbytes for t in tensors)
        self._send(tensors, *others, **named)


def compare(way: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The bytes of a step (in float32), and how far both processes are from one with all rows.

    Raises:
        ValueError: the two processes trained different numbers.
    """
    differences = {}
    for dtype in DTYPES:
        first, second = (torch.load(folder / f"{way}_{dtype}_{rank}.pt") for rank in range(WORLD))
        alone = train(way, dtype, None, options)["trained"]
        if not all(torch.equal(a, b) for a, b in zip(first["trained"], second["trained"], strict=True)):
            raise ValueError(f"{way}: the processes have different parameters after {options.steps} steps")
        pairs = zip(first["trained"], alone, strict=True)
        differences[dtype] = max(float((a - b).abs().max()) for a, b in pairs)
        if dtype == "float32":
            exchanged = first["bytes"]
    return {"bytes": exchanged, "largest_difference": differences}


# ------------------------------------------------------------------------------------------ what is printed


def render(results: dict[str, Any]) -> str:
    shape, found = results["shape"], results["ways"]
    lines = [
        f"Llama of {shape['layers']} layers, {shape['width']} wide, h {shape['num_vectors']}, "
        f"b {shape['vector_length']}: bytes of a step, by one process",
        "",
        "| | gradients | as counted | of PEFT's VB-LoRA | buffers | of PEFT's, with buffers | difference, float32 "
        "| float64 |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    peft = found[PEFT]["bytes"]
    for way, one in found.items():
        sent, apart = one["bytes"], one["largest_difference"]
        same = "yes" if sent["gradients"] == results["counted"][way] else f"no: {results['counted'][way]:,}"
        lines.append(
            f"| {way} | {sent['gradients']:,.0f} | {same} | {sent['gradients'] / peft['gradients']:.2%} "
            f"| {sent['buffers']:,.0f} | {sum(sent.values()) / sum(peft.values()):.2%} "
            f"| {apart['float32']:.1e} | {apart['float64']:.1e} |"
        )
    large = results["llama2_7b"]
    lines += ["", "Llama2-7B, all linear layers, h 2048, b 256, gradients counted:", ""]
    lines += ["| | bytes | of PEFT's VB-LoRA |", "|---|---:|---:|"]
    lines += [f"| {way} | {large[way]:,} | {large[way] / large[PEFT]:.2%} |" for way in (LORA, PEFT, HERE)]
    goal = f"Goals: {GOAL_BYTES:.0%} of PEFT's bytes, a difference of {GOAL_DIFFERENCE:.0e}."
    return "\n".join([*lines, "", goal])


if __name__ == "__main__":
    commands.run(main, "exchange")
