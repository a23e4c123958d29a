"""How an adapter works within a model whose classes, objects and parameter names stay as they are.

Hooks are small objects, not closures: a deep copy of the model copies them and the adapter they hold together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from vblora.forward import ForwardPath


def install_hooks(adapter: ForwardPath, model: nn.Module, layers: Sequence[tuple[nn.Module, list[int]]]) -> list[Any]:
    """Hook the model, its input embeddings, and each layer with the numbers of the targets that are in it."""
    return [
        model.register_forward_pre_hook(_RootHook(adapter)),
        model.register_forward_hook(_RootEndHook(adapter)),
        *(inputs.register_forward_hook(_EmbeddingHook(adapter)) for inputs in _input_embeddings(model)),
        *(layer.register_forward_hook(_LayerHook(adapter, indices), with_kwargs=True) for layer, indices in layers),
    ]


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

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not self.adapter.enabled or self.adapter.merged:
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        # A plain layer's output is nobody else's: its backward does not need it. Another hook might have kept it.
        kept = len(module._forward_hooks) > 1 or _global_forward_hooks
        in_place = type(module) is nn.Linear and not kept
        return self.adapter.add_to(output, x, self.indices, in_place)


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
