"""Which dimension of a layer's input counts the rows of the batch: a model may have the sequence first inside.

Found out by the base model itself: once for all layers, the second row of the first batch is run alone, and with the
first. The dimension that has grown counts the rows; and if the second row's values are others then, the rows do not
stand by themselves, so that none can have an adapter of its own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

APART = 0.02  # of their norm: rounding, in 16 bits too, stays below it


class BatchDims:
    """What is known of the layers of one model; `batch_dim` is the dimension of the model's own inputs."""

    def __init__(self, batch_dim: int | None) -> None:
        self.batch_dim = batch_dim or 0
        self._is_said = batch_dim is not None
        self._dims: dict[tuple[str, int], int] = {}  # by layer and number of dimensions
        self._why: str = ""  # no dimension could be found
        self._seen: ContextVar[dict[tuple[str, int], Tensor] | None] = ContextVar("seen", default=None)

    def is_looking(self, layer: str, x: Tensor) -> bool:
        """Whether this pass only finds out about dimensions; the layer's input is noted then."""
        seen = self._seen.get()
        if seen is not None:
            seen.setdefault((layer, x.dim()), x.detach())
        return seen is not None

    def of(self, layer: str, x: Tensor, names: int) -> int:
        """The dimension that counts rows.

        Raises:
            ValueError: it is no multiple of the names, or nothing says which it is.
        """
        dim = self._dims.get((layer, x.dim()))
        if dim is None:
            dim = 0
            if names > 1 and any(size % names == 0 for size in x.shape[1:-1]):
                raise ValueError(
                    f"nothing says which dimension of {tuple(x.shape)}, the input of {layer}, counts the rows of the "
                    f"batch{self._why}: run each adapter in a batch of its own"
                )
        if x.shape[dim] % names:
            raise ValueError(f"rows() has {names} names, and the batch {x.shape[dim]} rows")
        return dim

    def learn(self, module: nn.Module, args: Any, kwargs: dict[str, Any], names: int) -> None:
        """Find out about the layers in `module`, which is about to be called so.

        Raises:
            ValueError: the rows do not stand by themselves, or the inputs may be sequences first.
        """
        if self._seen.get() is not None:
            return
        first = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if first is None or first.dim() <= self.batch_dim or first.shape[self.batch_dim] % names:
            return
        rows = first.shape[self.batch_dim]
        if not self._is_said and rows != names and names in first.shape[1 : max(2, first.dim() - 1)]:
            raise ValueError(
                f"rows() has {names} names, and either dimension of the input {tuple(first.shape)} may count them: say "
                "which with AdapterStore(..., batch_dim=0), or 1 for sequences first"
            )
        try:
            alone, both = (self._run(module, args, kwargs, rows, part) for part in (slice(1, 2), slice(0, 2)))
        except Exception as error:  # a call whose rows cannot be taken apart
            self._why = f" ({type(error).__name__} where two rows of the batch were run by themselves)"
            return
        for key in alone.keys() & both.keys():
            self._dims[key] = _grown(key[0], alone[key], both[key])

    def _run(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], rows: int, part: slice
    ) -> dict[tuple[str, int], Tensor]:
        """The inputs of the layers within a pass of these rows of the batch alone."""

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return copy.deepcopy(value)  # a cache would be written to
            for dim in (self.batch_dim, 0):
                if value.dim() > dim and value.shape[dim] == rows:
                    return value[(slice(None),) * dim + (part,)]
            return value

        with self._looking() as seen, torch.no_grad(), torch.random.fork_rng(devices=[]):
            module(*tree_map(cut, args), **tree_map(cut, kwargs))
        return seen

    @contextlib.contextmanager
    def _looking(self) -> Iterator[dict[tuple[str, int], Tensor]]:
        seen: dict[tuple[str, int], Tensor] = {}
        before = self._seen.set(seen)
        try:
            yield seen
        finally:
            self._seen.reset(before)


def _grown(layer: str, alone: Tensor, both: Tensor) -> int:
    """The dimension in which the input of two rows is longer than that of the second alone, which is its end."""
    grown = [dim for dim, (one, two) in enumerate(zip(alone.shape, both.shape, strict=True)) if two == 2 * one > 0]
    if len(grown) == 1:
        own = both.narrow(grown[0], alone.shape[grown[0]], alone.shape[grown[0]]).float()
        if (own - alone.float()).norm() <= APART * own.norm():
            return grown[0]
    raise ValueError(
        f"{layer} does not see the rows of the batch one by one: run each adapter in a batch of its own, or, if the "
        "inputs of the model have the sequence first, say AdapterStore(..., batch_dim=1)"
    )
