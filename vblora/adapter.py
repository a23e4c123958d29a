"""Attach an adapter to a model: its forward path, merging, detaching. Written once, for every method.

A method gives each adapted layer two factors, A (r x in) and B (out x r), and this file adds

    y = base(x) + B A dropout(x)

to the layer's output through a forward hook, so the base model keeps its classes, objects and parameter names.
What differs between methods - their parameters, and how factors come of them - stands in vblora/methods/.

Factors are composed once per forward pass, before the first layer runs, and kept without a gradient until a
parameter changes. Composing outside the layers is also what keeps both forms of gradient checkpointing right:
the recomputation of a segment finds the factors it had, and the reentrant form, whose first backward uses the
graph up, gets a new composition per segment.
"""

from __future__ import annotations

import keyword
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vblora.bank import Factors
from vblora.config import AdapterConfig
from vblora.counting import Count, LayerShape
from vblora.low_rank import add_low_rank, add_low_rank_, without_autocast
from vblora.targets import (
    find_saved,
    find_targets,
    is_quantized,
    layer_shapes,
    output_slice,
    weight_of,
    weight_part,
)


@torch.inference_mode(False)  # the adapter's own tensors must be normal ones, to be watched and trained
def attach(model: nn.Module, config: AdapterConfig, *, name: str | None = None, seed: int | None = None) -> Adapter:
    """Attach an adapter to `model` in place and freeze everything that it does not train.

    Args:
        model: any model of nn.Linear, Conv1D or bitsandbytes layers. It stays the same object.
        config: VBLoRAConfig, TiedLoRAConfig or LoRAXSConfig.
        name: attribute of the model that holds the adapter; "<method>_adapter" unless given.
        seed: seed of the initial values; drawn from PyTorch's generator unless given, and kept in
            `adapter.init_seed`.

    Returns:
        The adapter, a sub-module of the model.

    Raises:
        ValueError: no layer matches, a layer cannot be adapted, or the name is taken. The model is as before.
    """
    adapter_class = Adapter.methods.get(type(config))
    if adapter_class is None:
        known = ", ".join(sorted(c.__name__ for c in Adapter.methods))
        raise ValueError(f"attach takes one of {known}, not {type(config).__name__}")
    targets = find_targets(model, config)
    saved = find_saved(model, config)
    if seed is None:
        seed = int(torch.randint(2**31 - 1, ()))
    if not isinstance(seed, int):
        raise ValueError(f"seed must be a whole number, not {seed!r}")
    return install(model, adapter_class(config, targets, seed), name, saved)


@torch.inference_mode(False)
def install(model: nn.Module, adapter: Adapter, name: str | None, saved: dict[str, nn.Module]) -> Adapter:
    """Put a ready adapter into the model; what `attach` and `vblora.load` end with."""
    name = name or f"{adapter.config.method}_adapter"
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} cannot be the name of an adapter: it becomes an attribute of the model")
    if hasattr(model, name):
        raise ValueError(f"the model already has {name!r}: detach it first, or use another name")
    adapter._install(model, name, saved)
    return adapter


class TensorSpec(NamedTuple):
    """What a tensor in a file must be: floating point numbers, or whole numbers from 0 to `below` - 1."""

    shape: tuple[int, ...]
    below: int | None = None


class Adapter(nn.Module):
    """The adapter of one model. Methods derive from it; users get one from `vblora.attach` or `vblora.load`.

    Attributes:
        config: its settings.
        targets: the adapted layers by name; a layer of `split_modules` comes once for each of its parts.
        outputs: which of its layer's outputs each target adapts.
        shapes: their widths, in the same order.
        init_seed: the seed its initial values were drawn from; None where they came from a file.
    """

    methods: ClassVar[dict[type[AdapterConfig], type[Adapter]]] = {}
    groups: ClassVar[dict[str, str]] = {}
    """The group of `vblora.param_groups` that a parameter is in, by its name; for those not
    named, "adapter" for matrices and "scales" for vectors."""

    def __init_subclass__(cls, config: type[AdapterConfig] | None = None) -> None:
        """`class VBLoRA(Adapter, config=VBLoRAConfig)` makes a method known to `attach`."""
        super().__init_subclass__()
        if config is not None:
            Adapter.methods[config] = cls

    def __init__(self, config: AdapterConfig, targets: Mapping[str, nn.Module], seed: int | None) -> None:
        super().__init__()
        self.config = config
        self.init_seed = seed
        self.targets = dict(targets)  # a plain dict, so that the layers do not become sub-modules of the adapter
        self.outputs = {name: output_slice(name, module, config) for name, module in self.targets.items()}
        self.shapes: list[LayerShape] = layer_shapes(self.targets, config)
        self.saved: dict[str, nn.Module] = {}
        self._home: tuple[nn.Module, str] | None = None  # in a tuple, or nn.Module would register the model
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._trainable_before: set[str] = set()  # before the first adapter of the model
        self._originals: dict[str, Tensor] | None = None  # base weights while merged
        self._merged = False
        self._merged_over = 0  # adapters that were merged before this one
        self._enabled = True
        self._composition: _Composition | None = None
        self._composed: list[Factors] | None = None  # for compiled layers: the factors of the running pass
        self._pass_has_graph = False  # the running forward pass of the whole model began with gradients

    # -- what a method writes ------------------------------------------------------------------------------------

    def compose(self) -> tuple[Tensor, ...]:
        """What all factors are made of, computed from the parameters with their graph."""
        raise NotImplementedError  # pragma: no cover - every method has its own

    def factors(self, composed: tuple[Tensor, ...]) -> list[Factors]:
        """A (r, in) and B transposed (r, out) of each layer, as views of what `compose` gave."""
        raise NotImplementedError  # pragma: no cover - every method has its own

    def stored_parameters(self) -> Count:
        """What the adapter stores, without the modules of `modules_to_save`: see `vblora.counting.Count`."""
        raise NotImplementedError  # pragma: no cover - every method has its own

    @classmethod
    def spec(cls, config: AdapterConfig, shapes: Sequence[LayerShape], form: str) -> dict[str, TensorSpec]:
        """What a file of this form ("topk" or "full") holds: name, shape and kind of each tensor."""
        raise NotImplementedError  # pragma: no cover - every method has its own

    def tensors(self, form: str) -> dict[str, Tensor]:
        """The tensors of a file of this form, as `spec` describes them."""
        raise NotImplementedError  # pragma: no cover - every method has its own

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors of a file, already checked against `spec`."""
        raise NotImplementedError  # pragma: no cover - every method has its own

    def kept_config(self, form: str) -> AdapterConfig:
        """The settings that a file of this form is written with."""
        return self.config

    def forward(self, x: Tensor) -> Tensor:
        """Nothing: the adapter works through hooks. An nn.Sequential, though, calls each of its sub-modules."""
        return x

    # -- what users call -----------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The attribute of the model that holds this adapter."""
        return self._require_home()[1]

    @property
    def merged(self) -> bool:
        return self._merged

    def layer_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of each layer by name, in the adapter's own precision, without gradient."""
        with torch.no_grad():
            pairs = self.factors(self._current().tensors)
        return {shape.name: (a, b.T) for shape, (a, b) in zip(self.shapes, pairs, strict=True)}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base model alone. Modules of `modules_to_save` stay as they are: they are trained in place."""
        if self._merged:
            raise ValueError("a merged adapter cannot be switched off: unmerge it first")
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    @torch.no_grad()
    def merge(self, *, reversible: bool = True) -> None:
        """Add B A to each base weight; the forward pass is then the base model's alone.

        Args:
            reversible: keep the base weights (in CPU memory), so that `unmerge` restores them bit for bit.

        Raises:
            ValueError: already merged, or a weight is quantised, offloaded or shared with another module. Nothing
                has been merged then.
        """
        if self._merged:
            raise ValueError("the adapter is merged already")
        for name, module in self.targets.items():
            if is_quantized(module):
                raise ValueError(
                    f"{name} is quantised ({weight_of(module).dtype}), and rounding the sum again would change it: "
                    "load the base model in 16 or 32 bits to merge"
                )
            if weight_of(module).is_meta:
                raise ValueError(f"the weight of {name} is offloaded: load the base model in memory to merge")
            if others := self._sharing(name):
                raise ValueError(
                    f"the weight of {name} is also that of {', '.join(others)}, which merging would change"
                )
        factors = self.layer_factors()
        weights = {name: weight_part(module, self.outputs[name]) for name, module in self.targets.items()}
        if reversible:
            self._originals = {name: w.detach().to("cpu", copy=True) for name, w in weights.items()}
        for name, (a, b) in factors.items():
            delta, weight = b @ a, weights[name]  # (out, in)
            weight.copy_(weight.to(delta.dtype) + delta.to(weight.device))
        self._merged_over = sum(other._merged for other in self._others())
        self._merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weights back as they were before `merge`, bit for bit."""
        if not self._merged:
            raise ValueError("the adapter is not merged")
        if self._originals is None:
            raise ValueError("merged with reversible=False: the base weights were not kept")
        for other in self._others():
            if other._merged and other._merged_over > self._merged_over:
                raise ValueError(f"{other.name} was merged after {self.name}: unmerge it first")
        for name, module in self.targets.items():
            weight_part(module, self.outputs[name]).copy_(self._originals[name])
        self._merged, self._originals = False, None

    def detach(self) -> None:
        """Take the adapter off. A merged adapter stays merged into the weights; else the base model is back."""
        model, name = self._require_home()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        delattr(model, name)
        others = self._others()
        kept = _parameter_ids(*others, *(module for other in others for module in other.saved.values()))
        for parameter_name, parameter in model.named_parameters():
            if parameter.is_floating_point() and id(parameter) not in kept:
                parameter.requires_grad_(not others and parameter_name in self._trainable_before)
        self._home = None

    def save(self, directory: str, *, form: str = "topk") -> None:
        """Write the adapter, with its `modules_to_save`, as a directory: see `vblora.storage.save`."""
        from vblora.storage import save

        save(self, directory, form=form)

    def pack(
        self, path: str, *, bank: str = "lossless", weights: str | int = "lossless", heads: str = "lossless"
    ) -> int:
        """Write the adapter, with its `modules_to_save`, as one small file: see `vblora.storage.packed.write`."""
        from vblora.storage import packed

        return packed.write(self, path, bank=bank, weights=weights, heads=heads)

    def export_lora(self, directory: str, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the adapter as plain LoRA, exactly, for PEFT, vLLM and SGLang: see `vblora.storage.lora_format`."""
        from vblora.storage.lora_format import export

        export(self, directory, dtype=dtype)

    def start_from(self, directory: str, *, redraw: bool = False) -> None:
        """Take over the values of a saved adapter of the same settings, but not its heads: see `storage.restore`."""
        from vblora.storage import restore

        restore(self, directory, heads=False, redraw=redraw)

    def head_parameters(self) -> int:
        """Numbers in the modules of `modules_to_save`, which the paper's counts leave out."""
        return sum(p.numel() for module in self.saved.values() for p in module.parameters())

    # -- how it sits in the model --------------------------------------------------------------------------------

    def _install(self, model: nn.Module, name: str, saved: dict[str, nn.Module]) -> None:
        self.saved = saved
        self._home = (model, name)
        others = self._others()
        kept = _parameter_ids(*others, *(module for other in others for module in other.saved.values()))
        heads = _parameter_ids(*saved.values())
        self._trainable_before = (
            others[0]._trainable_before if others else {n for n, p in model.named_parameters() if p.requires_grad}
        )
        for parameter in model.parameters():
            if parameter.is_floating_point() and (id(parameter) in heads or id(parameter) not in kept):
                parameter.requires_grad_(id(parameter) in heads)
        self.train(model.training)
        self.to(_device_of(next(iter(self.targets.values()))))
        model.add_module(name, self)
        self._handles.append(model.register_forward_pre_hook(_RootHook(self)))
        self._handles.append(model.register_forward_hook(_RootEndHook(self)))
        embeddings = _input_embeddings(model)
        if embeddings is not None:
            self._handles.append(embeddings.register_forward_hook(_EmbeddingHook(self)))
        for indices in self._indices_by_layer():
            layer = self.targets[self.shapes[indices[0]].name]
            self._handles.append(layer.register_forward_hook(_LayerHook(self, indices), with_kwargs=True))

    def _indices_by_layer(self) -> list[list[int]]:
        """The numbers of the targets that are in one layer, layer by layer: one, or the parts of a split one."""
        by_layer: dict[int, list[int]] = {}
        for index, module in enumerate(self.targets.values()):
            by_layer.setdefault(id(module), []).append(index)
        return list(by_layer.values())

    def _others(self) -> list[Adapter]:
        """The model's other adapters."""
        model, _ = self._require_home()
        return [module for module in model.children() if isinstance(module, Adapter) and module is not self]

    def _sharing(self, name: str) -> list[str]:
        """Other modules whose parameter is the very weight of this target."""
        model, _ = self._require_home()
        weight, target = weight_of(self.targets[name]), self.targets[name]
        return [
            other
            for other, module in model.named_modules()
            if module is not target and any(p is weight for p in module._parameters.values())
        ]

    def _require_home(self) -> tuple[nn.Module, str]:
        if self._home is None:
            raise ValueError("the adapter is not attached to a model")
        return self._home

    def _current(self, *, layer: int | None = None) -> _Composition:
        """The composition for `layer`, or for a new forward pass of the whole model: the last one if it still serves.

        It does not if a parameter changed or its graph has been used up. A new forward pass gets a graph of its
        own, so that each of several passes can be gone back through alone. What went through a backward pass serves
        no longer even without gradients: a step has probably followed, and fused optimisers change parameters
        without PyTorch's version counter noticing.
        """
        want_graph = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        new_pass = layer is None
        if new_pass:
            self._pass_has_graph = want_graph
        state = self._state_key()
        last = self._composition
        if (
            last is None
            or last.used
            or last.state != state
            or (want_graph and (new_pass or not last.has_graph or (layer in last.to_recompute and in_backward())))
        ):
            self._composition = _Composition(self, state, want_graph)
        assert self._composition is not None
        if layer is not None and self._pass_has_graph and not want_graph:
            self._composition.to_recompute.add(layer)
        return self._composition

    def _state_key(self) -> tuple[Any, ...]:
        """Changes whenever a parameter or buffer is written to or moved."""
        tensors = [*self._parameters.values(), *self._buffers.values()]
        return tuple((t.data_ptr(), t._version) for t in tensors if t is not None)

    def _add_to(self, output: Tensor, x: Tensor, indices: list[int], in_place: bool) -> Tensor:
        """output + dropout(x) A^T B^T, computed in the output's precision, for the targets in one layer."""
        factors: Mapping[int, Factors] | Sequence[Factors]
        if torch.compiler.is_compiling():
            factors = self._traced_factors(indices, output.dtype, output.device)
        else:
            factors = self._current(layer=indices[0]).factors(output.dtype, output.device)
        if x.dtype != output.dtype or x.device != output.device:
            x = x.to(device=output.device, dtype=output.dtype)
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        with without_autocast(output.device.type):
            if self.outputs[self.shapes[indices[0]].name] == slice(None):
                add = add_low_rank_ if in_place else add_low_rank
                return add(output, x, *factors[indices[0]])
            return self._add_to_parts(output, x, indices, factors)

    def _add_to_parts(self, output: Tensor, x: Tensor, indices: list[int], factors: Any) -> Tensor:
        """The same for a layer that is several in one (`split_modules`)."""
        hidden = F.linear(x, torch.cat([factors[i][0] for i in indices]))  # (..., parts * r)
        parts = hidden.reshape(-1, hidden.shape[-1]).split(self.config.r, dim=-1)
        flat = output.reshape(-1, output.shape[-1])
        sums = list(flat.split(self.shapes[indices[0]].out_features, dim=-1))  # parts are equally wide
        for index, part in zip(indices, parts, strict=True):
            at = self.outputs[self.shapes[index].name].start // self.shapes[index].out_features
            sums[at] = torch.addmm(sums[at], part, factors[index][1])
        return torch.cat(sums, dim=-1).view(output.shape)

    def _traced_factors(self, indices: list[int], dtype: torch.dtype, device: torch.device) -> dict[int, Factors]:
        """While torch.compile traces: what was composed before the first layer, with none of the bookkeeping.

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
        return next(self.parameters()).device

    def __getstate__(self) -> dict[str, Any]:
        # The composition is a cache with a graph in it: neither can nor should be copied.
        return {**self.__dict__, "_composition": None, "_composed": None}


class _Composition:
    """The factors of one forward pass (or of many, where nothing needs a gradient)."""

    def __init__(self, adapter: Adapter, state: tuple[Any, ...], want_graph: bool) -> None:
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


# Hooks are small objects, not closures: a deep copy of the model copies them and the adapter they hold together.


class _RootHook:
    """Before the model's forward pass: have the factors composed, outside of every checkpointed segment."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __call__(self, model: nn.Module, args: Any) -> None:
        adapter = self.adapter
        if adapter._enabled and not adapter._merged:
            if torch.compiler.is_compiling():
                adapter._composed = adapter._traced_composition()
            else:
                composition = adapter._current()
                adapter._composed = composition.factors(*composition.own_precision)


class _RootEndHook:
    """After a compiled model's forward pass: let the factors go, or they would be one of its results."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self.adapter._composed = None


class _LayerHook:
    """After an adapted layer: add its B A x to the output."""

    def __init__(self, adapter: Adapter, indices: list[int]) -> None:
        self.adapter = adapter
        self.indices = indices

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not self.adapter._enabled or self.adapter._merged:
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        # A plain layer's output is nobody else's: its backward does not need it. Another hook might have kept it.
        kept = len(module._forward_hooks) > 1 or torch.nn.modules.module._global_forward_hooks
        in_place = type(module) is nn.Linear and not kept
        return self.adapter._add_to(output, x, self.indices, in_place)


class _EmbeddingHook:
    """After the input embeddings, with gradient checkpointing on: make their output require a gradient.

    The reentrant form runs a segment's backward only if its input requires one, and everything below the
    first adapted layer is frozen: without this the adapters would silently get no gradient.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        model, _ = self.adapter._require_home()
        if model.training and torch.is_grad_enabled() and not output.requires_grad:
            if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
                output.requires_grad_(True)


def in_backward() -> bool:
    """Whether a backward pass is running."""
    return torch._C._current_graph_task_id() != -1


def _parameter_ids(*modules: nn.Module) -> set[int]:
    return {id(p) for module in modules for p in module.parameters()}


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    """transformers' input embeddings, where the model is one of theirs and has some."""
    get_input = getattr(model, "get_input_embeddings", None)
    try:
        return get_input() if get_input is not None else None
    except NotImplementedError:
        return None


def _device_of(module: nn.Module) -> torch.device:
    """Where a layer computes: where its weight is, or where accelerate brings an offloaded one."""
    device = weight_of(module).device
    if device.type != "meta":
        return device
    hook = getattr(module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    return torch.device(execution if execution is not None else "cpu")
