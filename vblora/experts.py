"""Experts: matrices that transformers keeps E at a time in one parameter of three dimensions, each adapted as a layer.

A module of experts has such parameters, (E, out, in), or (E, in, out) where it is `is_transposed` as GPT-OSS's are.
Every expert e of every parameter is a target of its own, called `<parameter>.<e>`, with factors of its own, A_e (r, in)
and B_e (out, r), which come of the same bank as all others:

    y = W_e x + b_e + B_e A_e dropout(x)

The parameters stay as they are. While adapters are attached, the module goes from expert to expert as transformers'
"eager" implementation does, whatever `experts_implementation` says, and no copy of the weights is made. What a module
is asked for is what transformers' own implementations ask for (`transformers.integrations.moe`): is_transposed,
has_bias, has_gate, and _apply_gate or act_fn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vblora.config import AdapterConfig
from vblora.low_rank import is_traced

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Expert:
    """One expert's matrix, as a target of an adapter. It is no module, and part of none."""

    def __init__(self, holder: nn.Module, parameter: str, number: int) -> None:
        self.holder, self.parameter, self.number = holder, parameter, number

    @property
    def stack(self) -> Tensor:
        """The parameter that all experts are in."""
        return _stack(self.holder, self.parameter)

    @property
    def weight(self) -> Tensor:
        """A view of the expert's matrix (out, in)."""
        return self.part_of(self.stack)

    def part_of(self, stack: Tensor) -> Tensor:
        """A view of the expert's matrix (out, in) in a tensor that is kept as its parameter is."""
        matrix = stack[self.number]
        return matrix.T if self.holder.is_transposed else matrix

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def _hf_hook(self) -> Any:
        return getattr(self.holder, "_hf_hook", None)  # accelerate's, which brings offloaded weights

    def hook(self, adapter: Any, indices: Sequence[int]) -> _Handle:
        """Have the adapter's target of this number added to what this expert gives."""
        forward = next((f for f in map(vars(self.holder).get, PLACES) if isinstance(f, _Forward)), None)
        if forward is None:
            forward = _Forward(self.holder)
        forward.add(adapter, (self.parameter, self.number), *indices)
        return _Handle(forward, adapter)


def find_experts(model: nn.Module, config: AdapterConfig, saved: Collection[str]) -> dict[str, Any]:
    """The experts that `target_parameters` name, by `<parameter>.<number>`, in the model's order; PEFT's rule.

    Those in modules that are `saved`, trained in full, are left out.

    Raises:
        ValueError: a name matches nothing, or a parameter is no stack of experts as they are known here.
    """
    wanted = config.target_parameters or []
    inside = tuple(f"{name}." for name in saved)
    found: dict[str, Any] = {}
    idle = set(wanted)
    for full, module, name, parameter in _parameters(model):
        keys = {key for key in wanted if full == key or full.endswith(f".{key}")}
        idle -= keys
        if not keys or full.startswith(inside):
            continue
        if any(full == key or full.endswith(f".{key}") for key in config.split_modules or {}):
            raise ValueError(f"{full} holds experts, which split_modules cannot split: name it no more there")
        found |= stack_of(full, module, name, parameter)
    if idle:
        ends = sorted({name for _, _, name, parameter in _parameters(model) if parameter.ndim == 3})
        raise ValueError(
            f"target_parameters: no parameter of {type(model).__name__} is called {', '.join(sorted(idle))}; those of "
            f"three dimensions end in: {', '.join(ends) or 'none'}"
        )
    return found


def named_experts(model: nn.Module, wanted: Collection[str]) -> dict[str, Any]:
    """The experts of these full names, in the model's order; names of others, or of none, are passed over."""
    parameters = {name.rpartition(".")[0] for name in wanted}
    found: dict[str, Any] = {}
    for full, module, name, parameter in _parameters(model):
        if full in parameters:
            found |= stack_of(full, module, name, parameter)
    return {name: expert for name, expert in found.items() if name in wanted}


def parameter_of(name: str, target_parameters: Collection[str] | None) -> str | None:
    """The parameter that a target is an expert of, where these name it; None for a target that is a layer."""
    parameter, _, number = name.rpartition(".")
    known = number.isdecimal() and any(
        parameter == key or parameter.endswith(f".{key}") for key in target_parameters or []
    )
    return parameter if known else None


def layers_among(names: Iterable[str], target_parameters: Collection[str] | None) -> list[str]:
    """The names of targets that are no experts of these parameters."""
    return [name for name in names if parameter_of(name, target_parameters) is None]


def stack_of(full: str, module: nn.Module, name: str, parameter: nn.Parameter) -> dict[str, Any]:
    """The experts of one parameter, by name.

    Raises:
        ValueError: it is none that an adapter could go to; the message says why.
    """
    if parameter.ndim != 3 or parameter.is_nested:
        raise ValueError(
            f"{full} has {parameter.ndim} dimensions, and target_parameters take experts of one size, which have three "
            "(experts, out, in): layers are named in target_modules"
        )
    if any(not isinstance(getattr(module, flag, None), bool) for flag in ("is_transposed", "has_bias", "has_gate")):
        raise ValueError(
            f"{full}: {type(module).__name__} does not say how it keeps its experts (is_transposed, has_bias and "
            "has_gate, as transformers' modules of experts do), so that they cannot be adapted"
        )
    known = (_first(module), "down_proj")
    missing = [part for part in (*known, _gate(module)) if not hasattr(module, part)]
    if missing or name not in known:
        raise ValueError(
            f"{full} is none of the parameters {' and '.join(known)} of a module of experts that is known here"
            + (f": {type(module).__name__} has no {missing[0]}" if missing else "")
        )
    if hasattr(parameter, "_local_tensor") or getattr(module, "_is_expert_parallel", False):
        raise ValueError(f"{full} is divided over processes: adapt experts that each process has whole")
    if parameter.dtype not in FLOATS:
        raise ValueError(
            f"{full} is quantised ({parameter.dtype}), and experts are adapted in 16 or 32 bits: load the model so"
        )
    return {f"{full}.{number}": Expert(module, name, number) for number in range(len(parameter))}


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{name}".removeprefix("."), module, name, parameter


def _stack(module: nn.Module, name: str) -> Tensor:
    stack: Tensor = getattr(module, name)  # of all experts, the first dimension's
    return stack


def _first(module: nn.Module) -> str:
    """The parameter that an expert's input goes through."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _gate(module: nn.Module) -> str:
    """The function between an expert's two matrices."""
    return "_apply_gate" if module.has_gate else "act_fn"


# --- The forward pass -----------------------------------------------------------------------------------------------

PLACES = ("forward", "_old_forward")  # of a module, where its own forward can stand; the second behind accelerate's


class _Forward:
    """What a module of experts does while adapters are attached."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parts: list[tuple[Any, dict[tuple[str, int], int]]] = []  # by adapter, the target's number of each expert
        place = PLACES["_old_forward" in vars(module)]
        self.before = vars(module).get(place)
        setattr(module, place, self)

    def add(self, adapter: Any, expert: tuple[str, int], index: int) -> None:
        of_adapter = next((indices for other, indices in self.parts if other is adapter), None)
        if of_adapter is None:
            self.parts.append((adapter, of_adapter := {}))
        of_adapter[expert] = index

    def drop(self, adapter: Any) -> None:
        """Leave an adapter out; without any the module's own forward is back."""
        self.parts = [part for part in self.parts if part[0] is not adapter]
        place = next((place for place in PLACES if vars(self.module).get(place) is self), None)
        if self.parts or place is None:
            return
        if self.before is None:
            delattr(self.module, place)
        else:
            setattr(self.module, place, self.before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        active = [(adapter, indices) for adapter, indices in self.parts if adapter.enabled and not adapter.merged]
        if active:
            return self._adapted(active, *args, **kwargs)
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _adapted(
        self,
        active: list[tuple[Any, dict[tuple[str, int], int]]],
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Each token (tokens, hidden) through its k chosen experts, whose outputs are summed by their weights; both of
        these are (tokens, k), and called as in transformers' implementations."""
        module = self.module
        result = torch.zeros_like(hidden_states)
        experts = range(_stack(module, "down_proj").shape[0])
        for number in experts if is_traced() else [n for n in top_k_index.unique().tolist() if n in experts]:
            token, place = torch.where(top_k_index == number)
            x = self._linear(_first(module), number, hidden_states[token], active)
            x = getattr(module, _gate(module))(x)
            x = self._linear("down_proj", number, x, active) * top_k_weights[token, place, None]
            result.index_add_(0, token, x.to(result.dtype))
        return result

    def _linear(
        self, name: str, number: int, x: Tensor, active: list[tuple[Any, dict[tuple[str, int], int]]]
    ) -> Tensor:
        module = self.module
        matrix = _stack(module, name)[number]
        y = x @ matrix if module.is_transposed else F.linear(x, matrix)
        if module.has_bias:
            y = y + _stack(module, f"{name}_bias")[number]
        for adapter, indices in active:
            if (index := indices.get((name, number))) is not None:
                y = adapter.add_to(y, x, [index], in_place=True)
        return y


class _Handle:
    """Takes an adapter off a module of experts, as PyTorch's handles take off hooks."""

    def __init__(self, forward: _Forward, adapter: Any) -> None:
        self.forward, self.adapter = forward, adapter

    def remove(self) -> None:
        self.forward.drop(self.adapter)
