"""The forward path of every method: factors composed once a pass, and added to the output of each adapted layer.

    y = base(x) + B A dropout(x)

through forward hooks, so that the base model keeps its classes, objects and parameter names.

Factors are composed before the first layer runs, and kept without a gradient until a parameter changes. Composing
outside the layers is also what keeps both forms of gradient checkpointing right: the recomputation of a segment finds
the factors it had, and the reentrant form, whose first backward uses the graph up, gets a new composition per segment.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vblora.bank import Factors
from vblora.config import AdapterConfig
from vblora.low_rank import add_low_rank, add_low_rank_, add_to_parts, in_backward, is_traced, without_autocast
from vblora.shapes import LayerShape


class ForwardPath(nn.Module):
    """An adapter as its layers see it: `compose` and `factors` come from the method, the rest is here."""

    config: AdapterConfig
    shapes: list[LayerShape]
    outputs: dict[str, slice]

    def __init__(self) -> None:
        super().__init__()
        self._home: tuple[nn.Module, str] | None = None  # in a tuple, or nn.Module would register the model
        self.merged = False
        self.enabled = True
        self._passes = _Passes()
        self._latest = self._passes.own  # of whatever thread
        self._composed: list[Factors] | None = None  # for compiled layers: the factors of the running pass

    @property
    def home(self) -> tuple[nn.Module, str]:
        """The model that the adapter is attached to, and the attribute of the model that holds it.

        Raises:
            ValueError: it is attached to none.
        """
        if self._home is None:
            raise ValueError("the adapter is not attached to a model: attach one, or load it into its model")
        return self._home

    @home.setter
    def home(self, home: tuple[nn.Module, str] | None) -> None:
        self._home = home

    @property
    def went_backward(self) -> bool:
        """Whether a backward pass has been through the factors as they are composed now."""
        return self._pass.composition is not None and self._pass.composition.used

    def forget(self) -> None:
        """Let go of what was composed, in all threads: the parameters are about to change."""
        self._passes, self._composed = _Passes(), None
        self._latest = self._passes.own

    @property
    def _pass(self) -> _Pass:
        """This thread's pass. On a GPU the backward pass, and what it recomputes, has a thread of its own."""
        own = self._passes.own
        return self._latest if own.composition is None and in_backward() else own

    def train(self, mode: bool = True) -> ForwardPath:
        """As nn.Module's. What was written through `.data`, which PyTorch does not count, is seen here at last."""
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> ForwardPath:
        """As nn.Module's. `to_empty`, which gives a model on the meta device memory, leaves the adapter its values."""
        if ".to_empty." in getattr(fn, "__qualname__", ""):
            device = fn(torch.empty(0, device="cpu")).device
            return super()._apply(lambda tensor: tensor.to(device), recurse)
        return super()._apply(fn, recurse)

    def compose(self) -> tuple[Tensor, ...]:
        """What all factors are made of, computed from the parameters with their graph."""
        pairs = self.config.factors(self.shapes, dict(self.named_parameters()))
        return tuple(tensor for pair in pairs for tensor in pair)

    def factors(self, composed: tuple[Tensor, ...]) -> list[Factors]:
        """A (r, in) and B transposed (r, out) of each layer, as views of what `compose` gave."""
        return list(zip(composed[0::2], composed[1::2], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Nothing: the adapter works through hooks. An nn.Sequential, though, calls each of its sub-modules."""
        return x

    def begin_pass(self) -> None:
        """Compose before the model's first layer runs, outside of every checkpointed segment."""
        if not self.enabled or self.merged:
            return
        if is_traced():
            self._composed = self._traced_composition()
        else:
            composition = self.current()
            self._composed = composition.factors(*composition.own_precision)

    def end_pass(self) -> None:
        """Let traced factors go, or they would be one of the results of a compiled model."""
        if is_traced():
            self._composed = None

    def current(self, *, layer: int | None = None) -> _Composition:
        """The composition for `layer`, or for a new forward pass of the whole model: the last one if it still serves.

        It does not if a parameter changed or its graph has been used up. A new forward pass gets a graph of its
        own, so that each of several passes can be gone back through alone. What went through a backward pass serves
        no longer even without gradients: a step has probably followed, and fused optimisers change parameters
        without PyTorch's version counter noticing.
        """
        want_graph = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        new_pass = layer is None
        state = self.state_key()
        mine = self._pass
        last = mine.composition
        if new_pass:
            if mine.to_visit and last is not None and last.used:
                self._warn_of_no_gradient(mine.to_visit)
            mine.to_visit.clear()
            mine.has_graph = want_graph
            self._latest = mine
        if (
            last is None
            or last.used
            or last.state != state
            or (want_graph and (new_pass or not last.has_graph or (layer in last.to_recompute and in_backward())))
        ):
            last = mine.composition = _Composition(self, state, want_graph)
        if layer is not None and mine.has_graph and not want_graph:
            last.to_recompute.add(layer)
            mine.to_visit.add(layer)
        elif mine.to_visit and layer is not None and in_backward():
            mine.to_visit.discard(layer)
        return last

    def _warn_of_no_gradient(self, to_visit: set[int]) -> None:
        layers = ", ".join(self.shapes[index].name for index in sorted(to_visit)[:3])
        warnings.warn(
            f"reentrant gradient checkpointing gave no gradient to {len(to_visit)} adapted layers ({layers}, "
            'and so on): use the other form, model.gradient_checkpointing_enable({"use_reentrant": False})',
            stacklevel=2,
        )

    def state_key(self) -> tuple[Any, ...]:
        """Changes whenever a parameter or buffer is written to or moved."""
        tensors = [*self._parameters.values(), *self._buffers.values()]
        return tuple((t.data_ptr(), t._version) for t in tensors if t is not None)

    def add_to(self, output: Tensor, x: Tensor, indices: list[int], in_place: bool) -> Tensor:
        """output + dropout(x) A^T B^T, computed in the output's precision, for the targets in one layer."""
        factors: Mapping[int, Factors] | Sequence[Factors]
        traced = is_traced()
        if traced:
            factors = self._traced_factors(indices, output.dtype, output.device)
        else:
            factors = self.current(layer=indices[0]).factors(output.dtype, output.device)
        if x.dtype != output.dtype or x.device != output.device:
            x = x.to(device=output.device, dtype=output.dtype)
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        with without_autocast(output.device.type):
            if self.outputs[self.shapes[indices[0]].name] == slice(None):
                add = add_low_rank_ if in_place and not traced else add_low_rank
                return add(output, x, *factors[indices[0]])
            starts = [self.outputs[self.shapes[index].name].start for index in indices]
            return add_to_parts(output, x, [factors[index] for index in indices], starts)

    def _traced_factors(self, indices: list[int], dtype: torch.dtype, device: torch.device) -> dict[int, Factors]:
        """While PyTorch traces (`is_traced`): what was composed before the first layer, with none of the bookkeeping.

        A layer called without the whole model's forward pass composes for itself.
        """
        factors = self._traced_composition() if self._composed is None else self._composed
        return {
            i: (factors[i][0].to(device=device, dtype=dtype), factors[i][1].to(device=device, dtype=dtype))
            for i in indices
        }

    def _traced_composition(self) -> list[Factors]:
        with without_autocast(self.parameter_device.type):
            return self.factors(self.compose())

    @property
    def parameter_device(self) -> torch.device:
        if (first := next(self.parameters(), None)) is None:
            raise ValueError("the adapter's parameters are part of a flat piece, as FSDP 1 makes: use FSDP2 or DDP")
        return first.device

    def __getstate__(self) -> dict[str, Any]:
        # The composition is a cache with a graph in it: neither can nor should be copied.
        return {**self.__dict__, "_passes": (passes := _Passes()), "_latest": passes.own, "_composed": None}


class _Pass:
    """A forward pass of the whole model in one thread."""

    def __init__(self) -> None:
        self.composition: _Composition | None = None
        self.has_graph = False  # it began with gradients
        self.to_visit: set[int] = set()  # layers that reentrant checkpointing is to call again, in the backward pass


class _Passes(threading.local):
    """The passes of all threads: two that run the model at once must not use up each other's graph."""

    def __init__(self) -> None:
        self.own = _Pass()

    def __reduce__(self) -> Any:
        return _Passes, ()


class _Composition:
    """The factors of one forward pass (or of many, where nothing needs a gradient)."""

    def __init__(self, adapter: ForwardPath, state: tuple[Any, ...], want_graph: bool) -> None:
        adapter._composed = None
        self.state = state
        self.used = False  # its graph has been through a backward pass
        # Layers called without gradients in a pass that has them: reentrant checkpointing will call them again,
        # and go back through that call at once, when other layers may still need this composition's graph.
        self.to_recompute: set[int] = set()
        self._adapter = weakref.ref(adapter)
        self._by_precision: dict[tuple[torch.dtype, torch.device], list[Factors]] = {}
        device = adapter.parameter_device
        if device.type == "meta":
            raise ValueError(
                f"the parameters of {type(adapter).__name__} were offloaded: attach the adapter after the model "
                "has been given its device map"
            )
        # In autocast the factors are still composed in their own precision, and rounded once (in `factors`).
        # In inference mode they are made as normal tensors, because a later training pass may find them.
        no_autocast = torch.autocast(device_type=device.type, enabled=False)
        with torch.inference_mode(False), torch.set_grad_enabled(want_graph), no_autocast:
            tensors = adapter.compose()
            self.has_graph = any(t.requires_grad for t in tensors)
            if self.has_graph:
                tensors = self._joined(tensors)
        self.tensors: tuple[Tensor, ...] = tensors
        self.own_precision = tensors[0].dtype, device

    def _joined(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tensors, with those that need a gradient passed through one `_Joint`."""
        joined = iter(_Joint.apply(weakref.ref(self), *(t for t in tensors if t.requires_grad)))
        return tuple(next(joined) if t.requires_grad else t for t in tensors)

    def factors(self, dtype: torch.dtype, device: torch.device) -> list[Factors]:
        """The factors of all layers in this precision and on this device, made at the first call."""
        key = (dtype, device)
        if key not in self._by_precision:
            adapter = self._adapter()
            assert adapter is not None
            # With a graph even where the caller has switched gradients off: the first pass of reentrant
            # checkpointing has, and its recomputation, which needs them, finds these tensors.
            with torch.inference_mode(False), torch.set_grad_enabled(self.has_graph):
                converted = tuple(t.to(device=device, dtype=dtype) for t in self.tensors)
                self._by_precision[key] = adapter.factors(converted)
        return self._by_precision[key]


class _Joint(torch.autograd.Function):
    """The identity on all composed tensors at once. Its backward runs when every layer's gradient is there,
    and notes that the graph behind it is used up, so that the next forward pass composes anew."""

    @staticmethod
    def forward(ctx: Any, composition: weakref.ref[_Composition], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.composition = composition
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        composition = ctx.composition()
        if composition is not None:
            composition.used = True
            if (adapter := composition._adapter()) is not None:
                adapter._composed = None  # a step has probably followed when a compiled layer is called by itself
        return (None, *gradients)
