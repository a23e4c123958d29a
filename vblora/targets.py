"""Which layers of a model an adapter goes to, and their shapes. The matching rules are PEFT's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from vblora.config import AdapterConfig
from vblora.shapes import LayerShape

# Attribute names of classification heads in transformers (PEFT's SEQ_CLS_HEAD_NAMES).
HEAD_NAMES = ("score", "classifier")


def find_targets(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The layers that `config` names, by their full names, in the model's order.

    A layer of `split_modules` comes once for each of its parts, by the part's name: see `output_slice`.

    Raises:
        ValueError: nothing matched, a match is no linear layer, or one cannot be split.
    """
    names = dict(model.named_modules())
    saved = find_saved(model, config)
    inside_saved = tuple(f"{name}." for name in saved)
    if not config.target_modules:
        matched = []
    elif config.target_modules == "all-linear":
        output_layers = _output_layers(model)
        matched = [n for n, m in names.items() if is_linear(m) and n not in output_layers and not _in_peft(n, names)]
    else:
        matched = [n for n in names if n and is_target(config, n)]
    targets = {
        n: names[n]
        for n in matched
        if n not in saved and not n.startswith(inside_saved) and not _is_excluded(config, n)
    }
    if config.target_modules and not targets:
        known = sorted({n.rpartition(".")[2] for n, m in names.items() if is_linear(m)})
        raise ValueError(
            f"target_modules {config.target_modules!r} match no layer of {type(model).__name__}; "
            f"its linear layers end in: {', '.join(known) or 'none'}"
        )
    for name, module in targets.items():
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} has an adapter of PEFT's: call merge_and_unload() first, or name its {name}.base_layer"
            )
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"{name} is never called: nn.MultiheadAttention reads its weight alone, so that an adapter would do "
                f'nothing there. Leave it out with exclude_modules=["{name.rpartition(".")[2]}"]'
            )
        if not is_linear(module):
            raise ValueError(
                f"{name} is a {type(module).__name__}; an adapter needs nn.Linear, Conv1D or a bitsandbytes layer"
            )
    targets = _split(targets, config)
    if config.target_parameters:
        from vblora.experts import find_experts  # few settings have them

        targets |= find_experts(model, config, saved)
    return targets


def _split(targets: dict[str, nn.Module], config: AdapterConfig) -> dict[str, nn.Module]:
    """The targets with those of `split_modules` replaced by their parts."""
    result: dict[str, nn.Module] = {}
    unused = set(config.split_modules or {})
    for name, module in targets.items():
        key = split_key(name, config)
        if key is None:
            result[name] = module
            continue
        assert config.split_modules is not None
        unused.discard(key)
        parts, width = config.split_modules[key], layer_shape(name, module, slice(None)).out_features
        if width % len(parts):
            raise ValueError(f"split_modules: {name} is {width} wide, which is not {len(parts)} equal parts")
        result |= {f"{name}.{part}": module for part in parts if not _is_excluded(config, f"{name}.{part}")}
    if unused:
        raise ValueError(f"split_modules: no adapted layer is called {', '.join(sorted(unused))}")
    if targets and not result:
        raise ValueError(f"exclude_modules {config.exclude_modules!r} leave no part of the layers of split_modules")
    return result


def split_key(name: str, config: AdapterConfig) -> str | None:
    """The name in `split_modules` that makes this layer several, if one does."""
    return next((key for key in config.split_modules or {} if name == key or name.endswith(f".{key}")), None)


def output_slice(name: str, module: nn.Module, config: AdapterConfig) -> slice:
    """Which of a layer's outputs the target of this name adapts: all, or those of one part of `split_modules`."""
    layer, _, part = name.rpartition(".")
    key = split_key(layer, config) if layer else None
    if key is None:
        return slice(None)
    assert config.split_modules is not None
    parts = config.split_modules[key]
    width = layer_shape(layer, module, slice(None)).out_features // len(parts)
    return slice(parts.index(part) * width, (parts.index(part) + 1) * width)


def ends_of(name: str) -> list[str]:
    """A module's name and what is left of it after each of its dots: what a name in a list of targets may be."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


def _in_peft(name: str, names: Mapping[str, nn.Module]) -> bool:
    """Whether a module is part of an adapter of PEFT's: within a wrapped layer, and not the layer that is wrapped."""
    outer, _, part = name.rpartition(".")
    return bool(outer) and ((hasattr(names[outer], "base_layer") and part != "base_layer") or _in_peft(outer, names))


def find_saved(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules of `modules_to_save`, outermost only.

    Raises:
        ValueError: no name of the list is a module of the model. (Single names may be absent: PEFT writes
            both usual names of a classification head into its files.)
    """
    wanted = config.modules_to_save or []
    saved: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name == w or name.endswith(f".{w}") for w in wanted):
            if not name.startswith(tuple(f"{outer}." for outer in saved)):
                saved[name] = module
    if wanted and not saved:
        known = [name for name, _ in model.named_children()]
        raise ValueError(
            f"modules_to_save {wanted} name no module of {type(model).__name__} (it has: {', '.join(known)})"
        )
    return saved


def head_tensors(saved: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the modules trained in full, by their names in the model."""
    return {f"{name}.{key}": t for name, module in saved.items() for key, t in module.state_dict().items()}


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and what derives from it (bitsandbytes' 4- and 8-bit layers), or transformers' Conv1D.

    Not the output layer of nn.MultiheadAttention, which is never called: only its weight is read.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, whose weight is stored as (in, out); told by its name to need no import."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_quantized(module: nn.Module) -> bool:
    """A layer whose weight is packed in 4 or 8 bits (bitsandbytes; 4 bits may be stored as bfloat16)."""
    weight = weight_of(module)
    return not weight.is_floating_point() or type(weight).__name__ in ("Params4bit", "Int8Params")


def weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def weight_part(module: nn.Module, outputs: slice) -> Tensor:
    """A view of the weight's part for these outputs, (out, in) whatever the layer: Conv1D's is transposed."""
    weight = weight_of(module)
    return (weight.T if is_conv1d(module) else weight)[outputs]


def layer_shape(name: str, module: Any, outputs: slice) -> LayerShape:
    """The target's name, its input width, and its output width: the number of these outputs of the layer."""
    if is_conv1d(module):
        in_features, out_features = weight_of(module).shape
    else:
        in_features, out_features = module.in_features, module.out_features
    return LayerShape(name, in_features, len(range(out_features)[outputs]))


def layer_shapes(targets: Mapping[str, nn.Module], config: AdapterConfig) -> list[LayerShape]:
    """The shapes of all targets, in order."""
    return [layer_shape(name, module, output_slice(name, module, config)) for name, module in targets.items()]


def is_target(config: AdapterConfig, name: str) -> bool:
    wanted = config.target_modules
    if isinstance(wanted, str):
        return _matches(wanted, name)
    assert wanted is not None
    if name in wanted:
        return True
    return any(end in wanted for end in ends_of(name)) and _in_layers(config, name)


def _is_excluded(config: AdapterConfig, name: str) -> bool:
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        return _matches(excluded, name)
    return any(end in (excluded or []) for end in ends_of(name))


def _in_layers(config: AdapterConfig, name: str) -> bool:
    """Whether the layer's number is among `layers_to_transform`: the first number after the pattern counts."""
    wanted, patterns, parts = config.layers_to_transform, config.layers_pattern or ["[^.]*"], name.split(".")
    if wanted is None:
        return True
    numbers = [at for at, part in enumerate(parts[:-1]) if at and part.isdecimal()]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for at in numbers:
            if _matches(rf"(?:.*\.)?(?:{pattern})", ".".join(parts[:at])):
                return int(parts[at]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _matches(pattern: str, name: str) -> bool:
    from vblora.patterns import matches  # few settings have one

    return matches(pattern, name)


def _output_layers(model: nn.Module) -> set[str]:
    """Names under the model's output layer: the language-model head, else the classification head."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output is not None else None
    heads: Iterator[nn.Module | None]
    heads = iter([output]) if output is not None else (getattr(model, name, None) for name in HEAD_NAMES)
    outside = [head for head in heads if isinstance(head, nn.Module)]
    return {name for name, module in model.named_modules() if any(module in set(o.modules()) for o in outside)}
