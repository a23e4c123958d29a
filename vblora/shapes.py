"""The shapes of the adapted layers, and what VB-LoRA stores for them.

The paper compares methods by "# params": what has to be kept after training, in float32 equivalents (four bytes make
one parameter). For VB-LoRA it depends on how an index into the bank is counted, and the paper's tables do not always
count it the same way; `Count` therefore carries the three rules in use. The other methods are counted in
`vblora.counts`. Only the standard library is needed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

FLOAT32_BYTES = 4


class LayerShape(NamedTuple):
    """One adapted linear layer: y = W x with W of out_features x in_features."""

    name: str
    in_features: int
    out_features: int

    @property
    def kind(self) -> str:
        """The name with its numbers replaced by `*`: the same for one module of every block.

        >>> LayerShape("model.layers.7.self_attn.q_proj", 8, 8).kind
        'model.layers.*.self_attn.q_proj'
        """
        return ".".join("*" if part.isdecimal() else part for part in self.name.split("."))


class Count(NamedTuple):
    """What one adapter (or model) stores. The first three are float32 equivalents, rounded up.

    They differ only for VB-LoRA, in what one index into the bank costs.
    """

    parameters: int
    """One byte an index, however large the bank: the paper's rule."""
    with_index_bytes: int
    """As many bytes an index as the bank needs, see `index_bytes`."""
    authors_code: int
    """Four bytes an index, like a weight: for topk = 2, three parameters per sub-vector."""
    bytes: int
    """True bytes of the tensors in the saved file; the file's header is not included."""


def sub_vectors(shapes: Sequence[LayerShape], r: int, vector_length: int) -> int:
    """N, the number of sub-vectors of all the factors A (r x in) and B (out x r) together.

    N = sum over layers of r * ceil(in / b) + r * ceil(out / b), b being `vector_length`. Where b does not
    divide a dimension the last sub-vector of each row is cut to fit, and still needs its own selection.
    """
    require_positive(r=r, vector_length=vector_length)
    return sum(
        r * (tiles(shape.in_features, vector_length) + tiles(shape.out_features, vector_length)) for shape in shapes
    )


def tiles(features: int, vector_length: int) -> int:
    """Sub-vectors in a row of this many numbers; the last is cut to fit."""
    return _ceil_div(features, vector_length)


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """`total` dealt out in proportion to these weights, in whole numbers that add up to it."""
    ends = [(2 * total * sum(weights[:upto]) // sum(weights) + 1) // 2 for upto in range(len(weights) + 1)]
    return [end - start for start, end in pairwise(ends)]


def index_bytes(num_vectors: int) -> int:
    """Bytes of the smallest unsigned integer (1, 2, 4 or 8) that holds every index 0 .. num_vectors - 1."""
    require_positive(num_vectors=num_vectors)
    return next(size for size in (1, 2, 4, 8) if num_vectors <= 256**size)


def peft_index_bytes(num_vectors: int) -> int:
    """Bytes of one index in PEFT's top-k form: uint8, int16, int32 or int64.

    PEFT compares strictly (uint8 below 256 vectors) and uses signed types beyond, so that a bank of
    exactly 256 vectors takes two bytes an index where one would do.
    """
    require_positive(num_vectors=num_vectors)
    if num_vectors < 2**8:
        return 1
    if num_vectors < 2**15:
        return 2
    return 4 if num_vectors < 2**31 else 8


def count_vblora(shapes: Sequence[LayerShape], *, r: int, num_vectors: int, vector_length: int, topk: int = 2) -> Count:
    """VB-LoRA: the bank (h x b) and, for each of N sub-vectors, k indices and k - 1 weights.

    The weights sum to one, so the last is not stored. In float32 equivalents
    h b + N ((k - 1) + k s / 4), with s bytes an index; k = 2 and s = 1 give the paper's 1.5
    per sub-vector. `bytes` is that of PEFT's top-k form (`save_only_topk_weights`).
    """
    require_positive(num_vectors=num_vectors, topk=topk)
    if topk > num_vectors:
        raise ValueError(f"topk ({topk}) is larger than num_vectors ({num_vectors})")
    selections = sub_vectors(shapes, r, vector_length)

    def stored_bytes(bytes_per_index: int) -> int:
        weights = FLOAT32_BYTES * (num_vectors * vector_length + selections * (topk - 1))
        return weights + selections * topk * bytes_per_index

    return Count(
        parameters=_ceil_div(stored_bytes(1), FLOAT32_BYTES),
        with_index_bytes=_ceil_div(stored_bytes(index_bytes(num_vectors)), FLOAT32_BYTES),
        authors_code=_ceil_div(stored_bytes(FLOAT32_BYTES), FLOAT32_BYTES),
        bytes=stored_bytes(peft_index_bytes(num_vectors)),
    )


def float32(parameters: int) -> Count:
    """All of them float32: every rule counts the same."""
    return Count(parameters, parameters, parameters, parameters * FLOAT32_BYTES)


def check_rank(r: int, shapes: Sequence[LayerShape]) -> None:
    """Refuse a rank above every width: a small file, or one digit too many, could else ask for factors of any size.

    Raises:
        ValueError: naming the rank and the widest layer.
    """
    widest = max((max(shape.in_features, shape.out_features) for shape in shapes), default=0)
    if r > widest:
        raise ValueError(f"r {r} is above every width of its layers, of which the widest is {widest}")


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def require_positive(**values: int) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} must be a positive whole number, not {value}")
