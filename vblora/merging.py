"""An adapter's sum with the weights of its layers: whether it can be had, and how a whole model is written with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vblora.forward import ForwardPath
from vblora.targets import is_conv1d, is_quantized, weight_of, weight_part


class Mergeable(ForwardPath):
    """An adapter that can be added to the weights of its layers, and taken out again."""

    targets: dict[str, nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self._originals: dict[str, Tensor] | None = None  # base weights while merged
        self._merged_over = 0  # adapters that were merged before this one

    def layer_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of each layer by name."""
        raise NotImplementedError

    def require_layers(self) -> None:
        """Refuse to go on where a layer was replaced after `attach`: the adapter acts on the old one alone.

        Raises:
            ValueError: naming the layers.
        """
        check_in_place(self.home[0], self.targets)

    @torch.no_grad()
    def merge(self, *, reversible: bool = True) -> None:
        """Add B A to each base weight; the forward pass is then the base model's alone.

        Args:
            reversible: keep the base weights (in CPU memory), so that `unmerge` restores them bit for bit.

        Raises:
            ValueError: already merged, or a weight is quantised, offloaded or shared with another module. Nothing
                has been merged then.
        """
        if self.merged:
            raise ValueError("the adapter is merged already")
        self.require_layers()
        check_mergeable(self.home[0], self.targets)
        factors = self.layer_factors()
        weights = {name: weight_part(module, self.outputs[name]) for name, module in self.targets.items()}
        if reversible:
            self._originals = {name: w.detach().to("cpu", copy=True) for name, w in weights.items()}
        for name, (a, b) in factors.items():
            delta, weight = b @ a, weights[name]  # (out, in)
            weight.copy_(weight.to(delta.dtype) + delta.to(weight.device))
        self._merged_over = sum(other.merged for other in self._others())
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weights back as they were before `merge`, bit for bit."""
        if not self.merged:
            raise ValueError("the adapter is not merged")
        if self._originals is None:
            raise ValueError("merged with reversible=False: the base weights were not kept")
        for other in self._others():
            if other.merged and other._merged_over > self._merged_over:
                raise ValueError(f"{other.name} was merged after {self.name}: unmerge it first")
        for name, module in self.targets.items():
            weight_part(module, self.outputs[name]).copy_(self._originals[name])
        self.merged, self._originals = False, None

    def _others(self) -> list[Any]:
        """The model's other adapters."""
        model, _ = self.home
        return [module for module in model.children() if isinstance(module, Mergeable) and module is not self]


def check_mergeable(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose weight cannot take a sum, or is another module's too.

    Raises:
        ValueError: naming the layer and why.
    """
    users: dict[int, list[tuple[str, nn.Module]]] = {}  # by parameter the modules that have it
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append((name, module))
    for name, module in targets.items():
        weight, holder = weight_of(module), _holder(module)
        if is_quantized(module):
            raise ValueError(
                f"{name} is quantised ({weight.dtype}), and rounding the sum again would change it: "
                "load the base model in 16 or 32 bits to merge"
            )
        if weight.is_meta:
            raise ValueError(f"the weight of {name} is offloaded: load the base model in memory to merge")
        if others := [other for other, user in users.get(id(_parameter(module)), ()) if user is not holder]:
            raise ValueError(f"the weight of {name} is also that of {', '.join(others)}, which merging would change")


def with_tied(model: nn.Module, saved: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """These modules, and those that share a parameter with one of them: PEFT, which copies modules, needs all named."""
    shared = {id(p) for module in saved.values() for p in module.parameters()}
    inside = tuple(f"{name}." for name in saved)
    tied = {
        name: module
        for name, module in model.named_modules()
        if name not in saved
        and not name.startswith(inside)
        and any(id(p) in shared for p in module.parameters(recurse=False))
    }
    return saved | tied


def check_in_place(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Refuse layers that were replaced after `attach`: the adapter acts on the old ones alone.

    Raises:
        ValueError: naming the first.
    """
    names = dict(model.named_modules(remove_duplicate=False))
    gone = [name for name, module in targets.items() if not _is_or_wraps(_place(names, name, module), _holder(module))]
    if gone:
        more = f" and {len(gone) - 1} more layers were" if len(gone) > 1 else " was"
        raise ValueError(
            f"{gone[0]}{more} replaced after the adapter was attached, so that the adapter does nothing there: "
            "change the model first, then attach or load the adapter"
        )


def _place(names: Mapping[str, nn.Module], name: str, target: Any) -> nn.Module | None:
    """What is now at the place of the layer that a target is, or is a part of, or of the experts that it is one of."""
    outer = name.rpartition(".")[0]
    if not isinstance(target, nn.Module):
        return names.get(outer.rpartition(".")[0])
    return names.get(name, names.get(outer))


def _holder(target: Any) -> nn.Module:
    """The module that holds a target's weight: the layer itself, or the module of experts that one is in."""
    holder: nn.Module = target if isinstance(target, nn.Module) else target.holder
    return holder


def _parameter(target: Any) -> Tensor:
    """The parameter that a target's weight is, or is a part of."""
    parameter: Tensor = weight_of(target) if isinstance(target, nn.Module) else target.stack
    return parameter


def _is_or_wraps(found: nn.Module | None, module: nn.Module) -> bool:
    """Whether a layer is still at its place, by itself or within a wrapper such as activation checkpointing's."""
    return found is module or (found is not None and any(inner is module for inner in found.modules()))


MARK = "_hf_peft_config_loaded"  # transformers' sign of a model with an adapter: without it none in 4 bits is trained


def stand_in(model: Any) -> None:
    """What a model of transformers needs to know while adapters are attached: how it is saved, and that it has any."""
    if not hasattr(type(model), "save_pretrained") or "save_pretrained" in vars(model):
        return
    mark = bool(getattr(model, "is_quantized", False)) and not getattr(model, MARK, False)
    model.save_pretrained = SavePretrained(model, mark)
    if mark:
        setattr(model, MARK, True)


def stand_aside(model: Any) -> None:
    """Take `stand_in` back."""
    own = vars(model).pop("save_pretrained", None)
    if isinstance(own, SavePretrained) and own.mark:
        delattr(model, MARK)


class SavePretrained:
    """`model.save_pretrained` while adapters are attached: what it writes is the model as it was trained.

    The adapters are added to the weights that are written, so that `from_pretrained` gives the trained model; the model
    itself stays as it is. A trainer that passes a state of its own, to resume from, gets what transformers writes.
    """

    def __init__(self, model: nn.Module, mark: bool) -> None:
        self.model = model
        self.mark = mark
        self._warned = False

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        save = type(model).save_pretrained
        if "state_dict" not in kwargs:
            kwargs["state_dict"] = merged_state(self.model)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"{save_directory} holds the base model and the adapter's tensors, to resume from: from_pretrained "
                "takes the base model alone. adapter.save(DIRECTORY) writes the adapter",
                stacklevel=3,
            )
        with self._unmarked():  # transformers would look for PEFT's adapters
            return save(model, save_directory, *args, **kwargs)

    @contextmanager
    def _unmarked(self) -> Iterator[None]:
        if not self.mark:
            yield
            return
        setattr(self.model, MARK, False)
        try:
            yield
        finally:
            setattr(self.model, MARK, True)


@torch.no_grad()
def merged_state(model: Any) -> dict[str, Tensor]:
    """The model's state with its adapters added to the weights, and without the adapters' own tensors.

    Raises:
        ValueError: a layer was replaced, or a weight cannot take a sum: see `check_mergeable`.
    """
    adapters = {name: module for name, module in model.named_children() if hasattr(module, "layer_factors")}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(tuple(f"{name}." for name in adapters))
    }
    for adapter in adapters.values():
        if adapter.merged or not adapter.enabled:
            continue
        adapter.require_layers()
        try:
            check_mergeable(model, adapter.targets)
        except ValueError as error:
            raise ValueError(
                f"save_pretrained writes the adapter's sum with the weights, and {error}; adapter.save(DIRECTORY) "
                "writes the adapter alone"
            ) from error
        names = {id(module): name for name, module in model.named_modules()}
        own: set[str] = set()  # tensors of the state that are the model's no more
        for target, (a, b) in adapter.layer_factors().items():
            layer = adapter.targets[target]
            key = f"{names[id(_holder(layer))]}.{getattr(layer, 'parameter', 'weight')}"
            if key not in own:
                own.add(key)
                state[key] = state[key].clone()
            if not isinstance(layer, nn.Module):
                part = layer.part_of(state[key])
            else:
                part = (state[key].T if is_conv1d(layer) else state[key])[adapter.outputs[target]]  # (out, in)
            part.copy_(part.to(b.dtype) + (b @ a).to(part.device))
    return state
