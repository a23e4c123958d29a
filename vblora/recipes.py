"""Settings with which VB-LoRA learns faster per step, from the widths of a model's layers (docs/recipe.md).

Why plain settings are slow. A vector of the bank serves n sub-vectors, and their gradients are as good as orthogonal to
each other. So a step moves each sub-vector by the rate times about 1/sqrt(n) along its own gradient, and by the rest
along those of others. And each factor learns through the other: with both near zero, both gradients are small; with
both large, their product is noise in the weights before anything is learned. LoRA has neither problem: n is 1, A starts
at its full size and B at zero. The recipe takes LoRA's start, and gives most of the bank to B, which learns first.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vblora import counts
from vblora.bank import Layout
from vblora.config import VBLoRAConfig
from vblora.groups import param_groups
from vblora.logits import divided
from vblora.shapes import Count, LayerShape, check_rank, tiles
from vblora.targets import find_targets, layer_shapes

RANK = 4
SHARE_OF_LORA = 5  # a bank of at most this part of LoRA's numbers, where nothing else is said
SHARE_OF_A, FEWEST_OF_A = 0.25, 4  # of the bank, and vectors
SIZE_OF_A = 3.0  # times LoRA's. B starts at zero, so that this costs no noise in the weights
# Of the bank, times LoRA's. A step moves a sub-vector by the rate whatever shares its vector, so that the rate which is
# too high does not depend on the sharing: at two and a half times this one the first gradient is lost.
RATE = 2.0
# LoRA's rate in the quick start, and the width of its encoder. Wider models have published rates that fall about as the
# width does; on narrower ones rates that rise so fast leave most runs where they began (benchmarks/narrow.py).
LORA_RATE, LORA_RATE_WIDTH = 2e-3, 384
# With several vectors to a sub-vector: logits so far apart that a mixture starts near one vector.
LOGITS_STD, LOGITS_RATE = 3.0, 3e-2
WARMUP, MAX_GRAD_NORM = 0.06, 1.0
LONGEST = 256  # of a sub-vector, as in the paper
SHORTEST = 16
RATE_OF = {"lr_vector_bank": "rate of the bank", "lr_logits": "rate of the logits"}


@dataclass(frozen=True)
class Choice:
    """One number of a recipe, and why it is that."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = f"{self.value:.4g}" if isinstance(self.value, float) else f"{self.value:,}"
        return f"{self.name:<24} {value:>8}  {self.reason}"

    def given(self, value: Any) -> Choice:
        """The same number with another value, where that is one and another."""
        return self if value in (None, self.value) else Choice(self.name, value, "as given")


@dataclass(frozen=True)
class Recipe:
    """What `vblora.recipe` gives. `print` shows every number with its reason.

    Attributes:
        config: for `vblora.attach`.
        rates: learning rates beside the head's, as `vblora.param_groups` takes them.
        warmup: share of the steps over which the rates rise, or from 1 up their number; they fall linearly to zero
            afterwards.
        max_grad_norm: what the gradient is clipped to.
        stored: what the trained adapter stores.
        choices: the numbers and their reasons.
    """

    config: VBLoRAConfig
    rates: dict[str, float]
    warmup: float
    max_grad_norm: float
    stored: Count
    choices: tuple[Choice, ...]

    def param_groups(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """`vblora.param_groups` of the adapted model with the recipe's rates; `lr` is the head's."""
        return param_groups(model, lr, weight_decay=weight_decay, **self.rates)

    def schedule(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        """The rates over so many steps; `step` it after each of the optimiser's. With w = warmup * steps, at step t:

            t / w up to w, and (steps - t) / (steps - w) from there, times each group's rate

        It is transformers' linear schedule, whose first step has a rate of 0: of one step nothing is learned.

        Raises:
            ValueError: steps is no whole number from 1 up.
        """
        _require_whole(steps=steps)
        rising = math.ceil(self.warmup * (steps if self.warmup < 1 else 1))  # as transformers counts a share
        return LambdaLR(optimizer, lambda t: t / rising if t < rising else max(0, steps - t) / max(1, steps - rising))

    def trained_with(
        self, rates: Mapping[str, float | None], warmup: float, max_grad_norm: float, decay: str = "linear"
    ) -> Recipe:
        """The recipe of a run that may train otherwise: what differs is said to be given. A rate of None is none."""
        own = {name: rate for name in self.rates if (rate := rates.get(name)) is not None}
        given = {RATE_OF[name]: rate for name, rate in own.items()}
        given |= {"warm-up": warmup, "gradient clipped to": max_grad_norm}
        left_out = {RATE_OF[name] for name in self.rates.keys() - own.keys()}
        choices = [choice.given(given.get(choice.name)) for choice in self.choices if choice.name not in left_out]
        if decay != "linear" or warmup >= 1:
            unit = "of the steps" if warmup < 1 else "steps"
            then = Choice("warm-up", warmup, f"{unit}, then {decay}{' to zero' if decay == 'linear' else ''}, as given")
            choices = [then if choice.name == "warm-up" else choice for choice in choices]
        return replace(self, rates=own, warmup=warmup, max_grad_norm=max_grad_norm, choices=tuple(choices))

    def to_dict(self) -> dict[str, Any]:
        """All of it for a record."""
        return {
            "config": self.config.to_dict(),
            "rates": dict(self.rates),
            "warmup": self.warmup,
            "max_grad_norm": self.max_grad_norm,
            "stored_parameters": self.stored._asdict(),
        }

    def __str__(self) -> str:
        return "\n".join(map(str, self.choices))


def recipe(
    model: nn.Module,
    target_modules: list[str] | str,
    *,
    max_bytes: int | None = None,
    lora_rate: float | None = None,
    r: int = RANK,
    topk: int = 1,
    num_vectors: int | None = None,
    vector_length: int | None = None,
    **settings: Any,
) -> Recipe:
    """VB-LoRA's settings for these layers of a model. The model is only looked at.

    The bank starts within bound, with in_l the input widths and w the weights of a mixture, and trains at rate:

        bound^2 = 3^2 / mean of in_l over the layers / expected sum of w^2
        rate = 2 * LoRA's rate

    Args:
        model: the base model, or one without memory for its weights (device "meta").
        target_modules: which layers, as in `vblora.VBLoRAConfig`.
        max_bytes: of the adapter's tensors in PEFT's top-k form, without the file's header and modules trained in full;
            it decides num_vectors. A fifth of LoRA's numbers at the same rank unless given, or num_vectors.
        lora_rate: the rate at which LoRA would be trained. Unless given, 2e-3 at a width of 384, which was
            searched, and at another most frequent input width in inverse proportion to it, or to its root below 384.
        r, topk, num_vectors, vector_length: chosen by the user where given.
        settings: further fields of `vblora.VBLoRAConfig`, which go before the recipe's.

    Raises:
        ValueError: max_bytes and num_vectors together, a budget too small for any bank, or settings that
            `vblora.VBLoRAConfig` refuses.
    """
    if max_bytes is not None and num_vectors is not None:
        raise ValueError("max_bytes and num_vectors both decide the size of the bank: give one of them")
    _require_whole(topk=topk)
    sizes = {"max_bytes": max_bytes, "num_vectors": num_vectors, "vector_length": vector_length}
    _require_whole(**{name: value for name, value in sizes.items() if value is not None})
    if num_vectors is not None and num_vectors < 2 * topk:
        raise ValueError(f"num_vectors {num_vectors} is too few: A and B need topk {topk} each")
    for name, value in (("lora_rate", lora_rate), ("init_vector_bank_bound", settings.get("init_vector_bank_bound"))):
        known = isinstance(value, Real) and type(value) is not bool  # NumPy's too
        if value is not None and not (known and 0 < float(value) < math.inf):
            raise ValueError(f"{name} must be a number above 0, not {value!r}")
        if value is not None and name in settings:
            settings[name] = float(value)
    if unknown := sorted(settings.keys() - {field.name for field in fields(VBLoRAConfig)}):
        raise ValueError(f"unknown setting of vblora: {', '.join(unknown)}")
    # The start's settings are looked at with the bank's size, below.
    looks = {name: value for name, value in settings.items() if not name.startswith("init_")}
    probe = VBLoRAConfig(r=r, target_modules=target_modules, **looks)
    shapes = layer_shapes(find_targets(model, probe), probe)
    check_rank(r, shapes)
    b, why_b = _length(shapes) if vector_length is None else (vector_length, "as given")
    h, why_h = (num_vectors, "as given") if num_vectors is not None else _vectors(shapes, r, b, topk, max_bytes)
    start = {"init_logits_std": LOGITS_STD, "init_vectors_of_a": _vectors_of_a(h, r, topk), **settings}
    chosen = {"r": r, "topk": topk, "num_vectors": h, "vector_length": b, **start}
    config = VBLoRAConfig(target_modules=target_modules, **chosen)
    if config.init_by_kind:
        divided(config, Layout(shapes, r, b).parts)  # refuses a bank of too few vectors for all kinds
    if "init_vector_bank_bound" not in settings:
        squared = len(shapes) / sum(shape.in_features for shape in shapes) / _weights_squared(config)
        chosen["init_vector_bank_bound"] = SIZE_OF_A * math.sqrt(squared)
        config = replace(config, init_vector_bank_bound=chosen["init_vector_bank_bound"])
    lora, why_lora = _lora_rate(shapes) if lora_rate is None else (float(lora_rate), "as given")
    rates = {"lr_vector_bank": RATE * lora, "lr_logits": LOGITS_RATE if topk > 1 else 0.0}
    stored = config.count(shapes)
    of_lora = counts.count_lora(shapes, r=r).parameters
    reasons = [
        ("r", "rank of the factors"),
        ("vector_length", why_b),
        ("num_vectors", why_h + _idle(shapes, config)),
        ("topk", _why_topk(topk)),
        ("init_vectors_of_a", "A is drawn from these; B from the others, which start at zero"),
        ("init_vector_bank_bound", f"A starts {SIZE_OF_A:g} times as large as LoRA's"),
        ("init_logits_std", "a mixture starts near one vector"),
    ]
    choices = [Choice(name, chosen[name], "as given" if name in settings else why) for name, why in reasons]
    choices += [
        Choice("rate of the bank", rates["lr_vector_bank"], f"{RATE:g} times LoRA's {lora:.4g}, {why_lora}"),
        Choice("rate of the logits", rates["lr_logits"], _why_logits(topk)),
        Choice("warm-up", WARMUP, "of the steps, then linear to zero"),
        Choice("gradient clipped to", MAX_GRAD_NORM, "the Trainer's default"),
        Choice("stored numbers", stored.parameters, f"{stored.bytes:,} bytes; LoRA of this rank: {of_lora:,} numbers"),
    ]
    return Recipe(config, rates, WARMUP, MAX_GRAD_NORM, stored, tuple(choices))


def _require_whole(**values: Any) -> None:
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number from 1 up, not {value!r}")


def _length(shapes: Sequence[LayerShape]) -> tuple[int, str]:
    """The longest power of two up to 256 that divides the widths, or up to 128 what may cut a row's last sub-vector.

    At most half the narrowest input: with one sub-vector to a row of A, rows that draw the same vector are the same,
    and the update's rank is lower than r. A few layers that are much narrower than the rest do not count: their
    vectors are cut, and shorter ones for all would be more to select and less to train.
    """
    widths = [width for shape in shapes for width in shape[1:]]
    half = max(1, min(_without_narrow([shape.in_features for shape in shapes])) // 2)
    longest = min(LONGEST, 1 << half.bit_length() - 1)
    # Without the narrow ones the length must be the whole of it: a shorter one would cut none of the rest.
    for some, least, which in (
        (widths, min(SHORTEST, half), "every width"),
        (_without_narrow(widths), longest, "all but the narrowest widths"),
    ):
        common = math.gcd(longest, *some)
        if common >= least:
            return common, f"the longest power of two up to 256 and half a usual row of A that divides {which}"
    return min(LONGEST // 2, half), "the widths have no long divisor in common: the last sub-vector of a row is cut"


def _without_narrow(widths: Sequence[int]) -> list[int]:
    """The widths without those below a quarter of their median, where these are at most a quarter of all."""
    narrow = statistics.median_high(widths) / 4
    kept = [width for width in widths if width >= narrow]
    return kept if len(kept) >= 0.75 * len(widths) else list(widths)


def _vectors(shapes: Sequence[LayerShape], r: int, b: int, topk: int, max_bytes: int | None) -> tuple[int, str]:
    """The largest bank within the budget."""
    if max_bytes is None:
        most = counts.count_lora(shapes, r=r).parameters // SHARE_OF_LORA * counts.FLOAT32_BYTES
        why = f"at most 1/{SHARE_OF_LORA} of LoRA's numbers"
    else:
        most, why = max_bytes, f"what {max_bytes:,} bytes of tensors hold"

    def size(h: int) -> int:
        return counts.count_vblora(shapes, r=r, num_vectors=h, vector_length=b, topk=topk).bytes

    h, enough = max(1, most // (counts.FLOAT32_BYTES * b)), topk * counts.sub_vectors(shapes, r, b)
    if h > enough:
        h, why = enough, "as many as the sub-vectors select"
    h = 2 * topk - 1 + bisect.bisect_right(range(2 * topk, h + 1), most, key=size)
    if h < 2 * topk:
        raise ValueError(
            f"{most:,} bytes hold no bank of {2 * topk} vectors of {b} numbers and the selection of "
            f"{counts.sub_vectors(shapes, r, b):,} sub-vectors: give more bytes, a lower r, fewer layers, or another "
            "vector_length"
        )
    return h, why


def _idle(shapes: Sequence[LayerShape], config: VBLoRAConfig) -> str:
    """How many vectors are likely to be drawn for no sub-vector, in words; "" for few."""
    r, b, h, of_a = config.r, config.vector_length, config.num_vectors, config.init_vectors_of_a
    for_a = sum(r * tiles(shape.in_features, b) for shape in shapes)
    for_b = sum(r * tiles(shape.out_features, b) for shape in shapes)
    sides = [(of_a, for_a), (h - of_a, for_b)] if of_a else [(h, for_a + for_b)]
    idle = sum(vectors * (1 - min(1.0, config.topk / vectors)) ** rows for vectors, rows in sides)
    return f"; about {idle:,.0f} of them are drawn for no sub-vector" if idle >= max(1, h / 100) else ""


def _lora_rate(shapes: Sequence[LayerShape]) -> tuple[float, str]:
    """LoRA's rate at the most frequent input width, and why."""
    width = Counter(shape.in_features for shape in shapes).most_common(1)[0][0]
    share = LORA_RATE_WIDTH / width
    known = f"{LORA_RATE:g} at a width of {LORA_RATE_WIDTH}"
    if share == 1:
        return LORA_RATE, f"at a width of {LORA_RATE_WIDTH}"
    if share < 1:
        return LORA_RATE * share, f"at {width} by 1/width from {known}"
    return LORA_RATE * math.sqrt(share), f"at {width} by 1/root of the width from {known}"


def _vectors_of_a(h: int, r: int, topk: int) -> int:
    """A quarter of the bank, or up to half of a small one: of one vector all rows of A would be the same."""
    return max(topk, min(r, FEWEST_OF_A, h // 2), round(SHARE_OF_A * h))


def _weights_squared(config: VBLoRAConfig) -> float:
    """The expected sum of squares of the weights of a mixture of A, as its logits are drawn: 1 for one vector."""
    if config.topk == 1:
        return 1.0
    vectors, generator = config.init_vectors_of_a or config.num_vectors, torch.Generator().manual_seed(0)
    drawn = torch.randn(1000, vectors, generator=generator, device="cpu") * config.init_logits_std
    drawn = drawn.abs() if config.init_vectors_of_a else drawn
    return float(drawn.topk(config.topk).values.softmax(dim=-1).square().sum(dim=-1).mean())


def _why_topk(topk: int) -> str:
    if topk == 1:
        return "one vector is selected, as drawn: no mixture of several learned faster"
    return "as given; selection is learned"


def _why_logits(topk: int) -> str:
    return "one vector has weight 1 whatever its logit" if topk == 1 else "selections settle within some hundred steps"
