"""What each method stores, counted from the shapes of the adapted layers alone.

VB-LoRA is counted in `vblora.shapes`. Of every other method each stored value is a float32. Only the standard library
is needed here. The paper's own figures are in `vblora_experiments.paper_counts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vblora.shapes import (
    FLOAT32_BYTES,
    Count,
    LayerShape,
    count_vblora,
    float32,
    index_bytes,
    peft_index_bytes,
    require_positive,
    sub_vectors,
)

__all__ = [
    "FLOAT32_BYTES",
    "METHODS",
    "Count",
    "LayerShape",
    "count_dora",
    "count_full",
    "count_lora",
    "count_lora_xs",
    "count_tied_lora",
    "count_vblora",
    "count_vera",
    "index_bytes",
    "peft_index_bytes",
    "sub_vectors",
]


def count_lora(shapes: Sequence[LayerShape], *, r: int) -> Count:
    """LoRA (arXiv 2106.09685): A and B of every layer, sum of r (in + out)."""
    require_positive(r=r)
    return float32(sum(r * (shape.in_features + shape.out_features) for shape in shapes))


def count_dora(shapes: Sequence[LayerShape], *, r: int) -> Count:
    """DoRA (arXiv 2402.09353): LoRA's A and B, and the magnitude of every output, sum of r (in + out) + out."""
    require_positive(r=r)
    return float32(sum(r * (shape.in_features + shape.out_features) + shape.out_features for shape in shapes))


def count_vera(shapes: Sequence[LayerShape], *, r: int) -> Count:
    """VeRA (arXiv 2310.11454): an r-vector and an output vector per layer, sum of r + out.

    The random matrices that all layers share are made again from their seed, and not stored.
    """
    require_positive(r=r)
    return float32(sum(r + shape.out_features for shape in shapes))


def count_tied_lora(shapes: Sequence[LayerShape], *, r: int) -> Count:
    """Tied-LoRA (arXiv 2311.09578): A and B once per kind of layer; an r-vector and an output vector each.

    Sum over kinds of r (in + out), plus sum over layers of r + out. Layers tie when `LayerShape.kind`
    is the same; one kind with two different shapes cannot be tied and is a ValueError.
    """
    require_positive(r=r)
    tied: dict[str, LayerShape] = {}
    for shape in shapes:
        first = tied.setdefault(shape.kind, shape)
        if first[1:] != shape[1:]:
            raise ValueError(
                f"Tied-LoRA cannot tie {first.name} ({first.in_features} -> {first.out_features}) to "
                f"{shape.name} ({shape.in_features} -> {shape.out_features}): their shapes differ"
            )
    shared = sum(r * (shape.in_features + shape.out_features) for shape in tied.values())
    return float32(shared + sum(r + shape.out_features for shape in shapes))


def count_lora_xs(shapes: Sequence[LayerShape], *, r: int) -> Count:
    """LoRA-XS (arXiv 2405.17604): one r x r matrix per layer, L r^2.

    A and B come from the singular value decomposition of the base weight and are not stored.
    """
    require_positive(r=r)
    return float32(len(shapes) * r * r)


def count_full(model_parameters: int) -> Count:
    """Full fine-tuning: every parameter of the model, in float32."""
    require_positive(model_parameters=model_parameters)
    return float32(model_parameters)


METHODS: dict[str, Callable[..., Count]] = {
    "vblora": count_vblora,
    "lora": count_lora,
    "dora": count_dora,
    "vera": count_vera,
    "tied_lora": count_tied_lora,
    "lora_xs": count_lora_xs,
}
"""The adapter methods by name. Each function takes the layer shapes, then its hyper-parameters by keyword."""
