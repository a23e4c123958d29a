"""How an adapter works within a model whose classes, objects and parameter names stay as they are.

Hooks are small objects, not closures: a deep copy of the model copies them and the adapter they hold together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils._pytree import tree_map

from vblora.config import AdapterConfig
from vblora.forward import ForwardPath
from vblora.targets import ends_of, find_saved, is_target, weight_of

# Classes that put a model, or a part of it, under a name of their own, and where they have it.
WRAPPERS = {
    "OptimizedModule": ("torch.compile", "_orig_mod"),
    "DataParallel": ("DataParallel", "module"),
    "DistributedDataParallel": ("DistributedDataParallel", "module"),
    "FullyShardedDataParallel": ("FullyShardedDataParallel", "module"),
    "DeepSpeedEngine": ("DeepSpeed", "module"),
    "AveragedModel": ("AveragedModel", "module"),
    "_FabricModule": ("Lightning Fabric", "_forward_module"),
    "CheckpointWrapper": ("checkpoint_wrapper", "_checkpoint_wrapped_module"),
}
HALF = (torch.float16, torch.bfloat16)


def require_plain(model: nn.Module) -> None:
    """Refuse a model in a wrapper, whose layers have other names there than in the model that files are loaded into.

    Raises:
        ValueError: the model or a part of it is in a wrapper, or parameters are being made without memory.
    """
    for name, module in model.named_modules():
        for kind in (kind.__name__ for kind in type(module).__mro__):
            if kind == "SentenceTransformer":
                raise ValueError(
                    "a SentenceTransformer saves its parts one by one: give the transformer in it, model[0].auto_model"
                )
            if kind in WRAPPERS:
                by, inside = WRAPPERS[kind]
                raise ValueError(
                    f"{name or 'the model'} is wrapped by {by}: attach or load the adapter first, to the model itself "
                    f"(here {f'model.{name}' if name else 'model'}.{inside}), then wrap that"
                )
    with torch.device("cpu"):
        if nn.Linear(1, 1, bias=False).weight.is_meta:
            raise ValueError(
                "parameters made now have no memory (accelerate's init_empty_weights), and the adapter's values would "
                "be lost: attach or load it after that block; the model may be on the meta device then"
            )


def warn_of_idle_names(model: nn.Module, config: AdapterConfig) -> None:
    """One misspelt name among several would otherwise be silently left out."""
    names = [name for name, _ in model.named_modules()]
    names += [f"{key}.{part}" for key, of_key in (config.split_modules or {}).items() for part in of_key]
    ends = {end for name in names for end in ends_of(name)}
    for field in ("target_modules", "exclude_modules"):
        wanted = getattr(config, field)
        idle = [w for w in wanted or [] if w not in ends]
        if isinstance(wanted, list) and idle:
            warnings.warn(f"{field}: no module is called {', '.join(idle)}", stacklevel=3)


def warn_of_experts(model: nn.Module, config: AdapterConfig, targets: Mapping[str, nn.Module]) -> None:
    """transformers keeps experts as one parameter of three dimensions, which is no layer and silently left out where
    `target_parameters` do not name it."""
    wanted, saved = config.target_modules, tuple(f"{name}." for name in find_saved(model, config))
    experts = {
        f"{prefix}.{name}".removeprefix("."): parameter
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if _is_of_experts(module, parameter)
        and f"{prefix}.{name}.0" not in targets
        and not f"{prefix}.".startswith(saved)
        and wanted
        and (wanted == "all-linear" or is_target(config, f"{prefix}.{name}"))
    }
    if experts:
        share = sum(p.numel() for p in experts.values()) / sum(p.numel() for p in model.parameters())
        warnings.warn(
            f"{len(experts)} parameters of experts stay as they are, {share:.0%} of the model's numbers: "
            f"{next(iter(experts))} and its like are no linear layers. target_parameters adapt them",
            stacklevel=3,
        )


def _is_of_experts(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether it is a stack of matrices: no convolution's kernels, no token or positions that a model learns, and
    nothing of another adapter."""
    others = (nn.Conv1d, nn.ConvTranspose1d, ForwardPath)
    return parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, others)


def device_of(module: nn.Module) -> torch.device:
    """Where a layer computes: where its weight is, or where accelerate brings an offloaded one."""
    device = weight_of(module).device
    if device.type != "meta":
        return device
    hook = getattr(module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    return torch.device(execution if execution is not None else "cpu")


def install_hooks(
    adapter: ForwardPath,
    model: nn.Module,
    layers: Sequence[tuple[nn.Module, list[int]]],
    saved: Mapping[str, nn.Module],
) -> list[Any]:
    """Hook the model, its input embeddings, and each layer with the numbers of the targets that are in it.

    Of a model in 16 bits, the modules that are trained in full (`saved`) are turned to float32, and stay so when the
    adapter is taken off.
    """
    for module in saved.values():
        train_in_float32(module)
    return [
        model.register_forward_pre_hook(_RootHook(adapter)),
        model.register_forward_hook(_RootEndHook(adapter)),
        *(inputs.register_forward_hook(_EmbeddingHook(adapter)) for inputs in _input_embeddings(model)),
        *(_hook(layer, adapter, indices) for layer, indices in layers),
    ]


def _hook(layer: nn.Module, adapter: ForwardPath, indices: list[int]) -> Any:
    """Hook a layer; an expert, which is no module that is called, does it for itself."""
    if not isinstance(layer, nn.Module):
        return layer.hook(adapter, indices)
    return layer.register_forward_hook(_LayerHook(adapter, indices), with_kwargs=True)


class _Hook:
    def __init__(self, adapter: ForwardPath) -> None:
        self.adapter = adapter


class _RootHook(_Hook):
    """Before the model's forward pass: have the factors composed, outside of every checkpointed segment."""

    def __call__(self, model: nn.Module, args: Any) -> None:
        self.adapter.begin_pass()


class _RootEndHook(_Hook):
    """After the model's forward pass."""

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        self.adapter.end_pass()


class _LayerHook(_Hook):
    """After an adapted layer: add its B A x to the output."""

    def __init__(self, adapter: ForwardPath, indices: list[int]) -> None:
        super().__init__(adapter)
        self.indices = indices

    def __call__(self, module: nn.Module, args: Any, *kwargs_and_output: Any) -> Any:
        output = kwargs_and_output[-1]  # alone in what quantize_dynamic makes, which calls hooks without kwargs
        if not self.adapter.enabled or self.adapter.merged:
            return output
        if not isinstance(output, Tensor):
            raise ValueError(f"{self.adapter.shapes[self.indices[0]].name} {no_tensor(module, output)}")
        x = args[0] if args else next(iter(kwargs_and_output[0].values()))
        # A plain layer's output is nobody else's: its backward does not need it. Another hook might have kept it.
        kept = len(module._forward_hooks) > 1 or _global_forward_hooks
        in_place = type(module) is nn.Linear and not kept
        return self.adapter.add_to(output, x, self.indices, in_place)


def train_in_float32(module: nn.Module) -> None:
    """Keep a module of 16 bits in float32 within a model of 16 bits, as the adapter is: small steps are not rounded
    away, and a GradScaler, which refuses gradients in float16, can be used."""
    kinds = {p.dtype for p in module.parameters()}
    if len(kinds) == 1 and (kind := kinds.pop()) in HALF:
        module.float()
        module.register_forward_pre_hook(_to_own_precision, with_kwargs=True)
        module.register_forward_hook(_BackTo(kind))


def _to_own_precision(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before a module: give it its input in the precision of its parameters."""
    return _in_precision((args, kwargs), next(module.parameters()).dtype)


class _BackTo:
    """After a module: give its output in the precision that it had in the model."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _in_precision(output, self.dtype)


def _in_precision(values: Any, dtype: torch.dtype) -> Any:
    """Tensors in a structure of them, those of 16 and 32 bits in this precision."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype in (*HALF, torch.float32) else value

    return tree_map(cast, values)


def no_tensor(module: nn.Module, output: Any) -> str:
    """What to say of a layer whose output an adapter cannot be added to."""
    return (
        f"is a {type(module).__name__} that gives a {type(output).__name__}, and an adapter is added to one tensor: "
        "leave it out with exclude_modules"
    )


class _EmbeddingHook(_Hook):
    """After input embeddings, with gradient checkpointing on: make their output require a gradient.

    The reentrant form runs a segment's backward only if its input requires one, and everything below the
    first adapted layer is frozen: without this the adapters would silently get no gradient.
    """

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        model, _ = self.adapter.home
        if model.training and torch.is_grad_enabled() and not output.requires_grad:
            if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
                output.requires_grad_(True)


def _input_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """Where inputs enter transformers' models: each part, as an encoder and a decoder, may have its own entry."""
    found: dict[int, nn.Module] = {}
    for part in model.modules():
        get_input = getattr(part, "get_input_embeddings", None)
        try:
            inputs = get_input() if get_input is not None else None
        except (NotImplementedError, AttributeError):  # a part without an entry of its own
            continue
        if isinstance(inputs, nn.Module):
            found[id(inputs)] = inputs
    yield from found.values()
