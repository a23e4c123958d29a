"""Composition of all sub-vectors from the bank, forward and backward: one embedding bag, the plain gather, PEFT's way.

    python benchmarks/composition.py [--rows 39040] [--num_vectors 2048] [--topk 2] [--dtype bfloat16] [--record FILE]

Defaults are Llama2-7B's, all linear layers. `vblora.bank.compose`; the gather `(weights * bank[indices]).sum(-2)` from
the same k logits; and PEFT's own function for each factor of 224 layers (448 calls), which starts from all h logits and
gives all of them a gradient. The ways take turns; a figure is the median of the rounds' ratios to the embedding bag.
In bfloat16 bank and logits are (`vblora.bank.compose` composes in float32 all the same), and differences are from it.
On a GPU also a Triton kernel (triton_composition.py), how many kernels each way starts, and for each way whether two
runs give the same bits, with torch.use_deterministic_algorithms and without.

Last result (results/speed/composition.json, CPU): gathering takes 1.9 of the embedding bag's time, PEFT's way 6.0.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.vblora.layer import Linear as PeftLinear
from torch import Tensor
from turns import medians, parser, ratios, report, require_positive, take_turns, timed

from vblora.bank import compose, select
from vblora_experiments import commands

BAG, GATHER, PEFT, TRITON = "embedding bag", "gather", "PEFT, factor by factor", "Triton kernel"
FACTORS = 448  # of Llama2-7B: A and B of 32 blocks of 7 layers
Way = Callable[[], tuple[Tensor, ...]]  # the sub-vectors, and the gradients of the bank and of the logits; see `_three`


def main(arguments: list[str]) -> None:
    options_of = parser(__doc__, rounds=5)
    options_of.add_argument("--rows", type=int, default=39_040, help="N, sub-vectors")
    options_of.add_argument("--num_vectors", type=int, default=2048, help="h")
    options_of.add_argument("--vector_length", type=int, default=256, help="b")
    options_of.add_argument("--topk", type=int, default=2, help="k")
    options_of.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of bank and logits")
    options = options_of.parse_args(arguments)
    require_positive(options, "rounds", "rows", "num_vectors", "vector_length", "topk")
    if options.topk > options.num_vectors:
        raise ValueError(f"--topk {options.topk} is more than the {options.num_vectors} vectors of the bank")
    results = measure(options)
    report("composition", results, render(results), options.record)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    has_triton = on_gpu and options.dtype == "float32" and importlib.util.find_spec("triton") is not None
    ways, indices = make_ways(options, "cuda" if on_gpu else "cpu", has_triton)
    seconds = take_turns({name: partial(timed, way) for name, way in ways.items()}, options.rounds)
    return {
        "shape": {name: getattr(options, name) for name in ("rows", "num_vectors", "vector_length", "topk")},
        "dtype": options.dtype,
        "rounds": options.rounds,
        "ms": {name: 1000 * taken for name, taken in medians(seconds).items()},
        "times_bag": ratios(seconds, BAG),
        "largest_difference": differences(ways, indices),
        "repeats": {name: repeats(way) for name, way in ways.items()},
        "kernels": {name: kernels(way) for name, way in ways.items()} if on_gpu else None,
        "triton": has_triton,
    }


# ------------------------------------------------------------------------------------------ the ways


def make_ways(options: argparse.Namespace, device: str, has_triton: bool) -> tuple[dict[str, Way], Tensor]:
    """All from the same bank, logits and gradient of the result; and the selected indices."""
    n, h, b, k = options.rows, options.num_vectors, options.vector_length, options.topk
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, options.dtype)
    bank = torch.empty(h, b).uniform_(-0.02, 0.02, generator=generator).to(device, kind).requires_grad_()
    logits = (torch.randn(n, h, generator=generator) * 0.1).to(device, kind)
    values, indices = select(logits, k)
    selected, gradient = values.clone().requires_grad_(), torch.randn(n, b, generator=generator).to(device)
    parts = [part.requires_grad_() for part in logits.detach().clone().tensor_split(min(n, FACTORS))]

    def from_selected(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        table = function(bank, indices, selected)
        return table.detach(), *torch.autograd.grad(table, (bank, selected), gradient.to(table.dtype))

    def by_peft() -> tuple[Tensor, ...]:
        tables = [PeftLinear._get_low_rank_matrix(None, part, bank, k) for part in parts]  # type: ignore[arg-type]
        grads = torch.autograd.grad(tables, (bank, *parts), gradient.to(kind).tensor_split(len(parts)))
        return *(table.detach() for table in tables), *grads

    ways: dict[str, Way] = {
        BAG: partial(from_selected, compose),
        GATHER: partial(from_selected, gather),
        PEFT: by_peft,
    }
    if has_triton:
        import triton_composition

        ways[TRITON] = partial(from_selected, triton_composition.compose)
    return ways, indices


def gather(bank: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
    """The formula as it stands: (h, b), (N, k), (N, k) -> (N, b), by way of (N, k, b)."""
    return (selected.softmax(dim=-1).unsqueeze(-1) * bank[indices]).sum(dim=-2)


# ------------------------------------------------------------------------------------------ what is asked of them


def differences(ways: dict[str, Way], indices: Tensor) -> dict[str, list[float]]:
    """Of the sub-vectors and of the two gradients from the embedding bag's, relative to the largest number there."""
    expected = ways[BAG]()
    found = {}
    for name, way in ways.items():
        pairs = zip(_three(way(), indices), expected, strict=True)
        found[name] = [float((a.float() - b.float()).abs().max() / b.abs().max()) for a, b in pairs]
    return found


def _three(results: tuple[Tensor, ...], indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The table (N, b), the bank's gradient (h, b) and the selected logits' (N, k); PEFT has the first and last in
    parts, and a gradient of all h logits."""
    parts = (len(results) - 1) // 2
    of_logits = torch.cat(results[parts + 1 :])
    if of_logits.shape != indices.shape:
        of_logits = of_logits.gather(1, indices)
    return torch.cat(results[:parts]), results[parts], of_logits


def repeats(way: Way) -> dict[str, bool | None]:
    """Whether two runs give the same bits, as they are and with deterministic algorithms (None: not offered there)."""
    found: dict[str, bool | None] = {"default": _same_bits(way)}
    torch.use_deterministic_algorithms(True)
    try:
        found["deterministic"] = _same_bits(way)
    except RuntimeError:  # PyTorch's way to say that there is no deterministic form
        found["deterministic"] = None
    finally:
        torch.use_deterministic_algorithms(False)
    return found


def _same_bits(way: Way) -> bool:
    return all(torch.equal(a, b) for a, b in zip(way(), way(), strict=True))


def kernels(way: Way) -> int:
    """Kernels that one forward and backward pass starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        way()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)


def render(results: dict[str, Any]) -> str:
    shape = ", ".join(f"{name} {value:,}" for name, value in results["shape"].items())
    lines = [shape, "", "| | ms | times the bag | largest difference | same bits twice | deterministic | kernels |"]
    lines.append("|---|---:|---:|---:|---|---|---:|")
    said = {True: "yes", False: "no", None: "not offered"}
    for way, taken in results["ms"].items():
        again = results["repeats"][way]
        count = "" if results["kernels"] is None else results["kernels"][way]
        lines.append(
            f"| {way} | {taken:.1f} | {results['times_bag'][way]:.2f} | {max(results['largest_difference'][way]):.1e} "
            f"| {said[again['default']]} | {said[again['deterministic']]} | {count} |"
        )
    if not results["triton"]:
        lines += ["", "The Triton kernel was left out: it needs a GPU, float32 and the package triton."]
    return "\n".join(lines)


if __name__ == "__main__":
    commands.run(main, "composition")
