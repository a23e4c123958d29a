"""An adapter as plain LoRA, exactly: the directory that PEFT, vLLM and SGLang read.

LoRA adds lora_alpha / r * B A to a layer, and every method here gives each layer an A and a B: with lora_alpha = r they
are LoRA's own matrices, and nothing is approximated.

    adapter_config.json         peft_type LORA, r, lora_alpha = r, target_modules
    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (r, in) and .lora_B.weight (out, r)

One r holds for the whole file, as engines want it: the factors of a lower rank are filled up with zeros. Layers of
`split_modules` (GPT-2's c_attn as q, k, v) become LoRA of the fused layer, which is the only one that others know,
with the rank of all its parts together. Layers that are apart in the model (Llama's q_proj, k_proj, v_proj) stay
apart; vLLM, which fuses them, takes them so.

Experts, E matrices in one parameter of a module, are kept as PEFT keeps `target_parameters`: all of them in one A
(E r, in), one expert after another, and one B (out, r E), whose column E i + e is column i of expert e. The parameters
of one module are wrapped one in another there, in their order, so that the last is called by the module's name and
each before it has one ".base_layer" more (vLLM looks for "experts.base_layer" and "experts" too).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vblora.config import AdapterConfig
from vblora.experts import layers_among, parameter_of
from vblora.files.content import Content
from vblora.files.directory import CONFIG_FILE, TENSOR_FILE
from vblora.files.peft_format import PREFIX
from vblora.io import new_directory, write_json, write_tensors
from vblora.targets import split_key

Pairs = Mapping[str, tuple[Tensor, Tensor]]


def export(
    content: Content,
    directory: str | Path,
    factors: Pairs | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    task_type: str | None = None,
) -> None:
    """Write an adapter of any method as a directory of plain LoRA.

    Heads (`modules_to_save`) go with it, where PEFT reads them; vLLM takes heads called "classifier" or "score" alone,
    and says so of others.

    Args:
        content: what `Adapter.content` or `vblora.files.packed.read` gave.
        directory: made; it must not exist, or be empty.
        factors: by layer, where the content alone does not give them (LoRA-XS).
        dtype: of the factors in the file.
        task_type: PEFT's, which its AutoPeftModelFor... classes ask for (`vblora.files.content.task_type_of`).

    Raises:
        ValueError: the directory is taken, `dtype` cannot hold the factors, or the file alone does not say what they
            are (LoRA-XS, packed). Nothing is written then.
    """
    whole = whole_layers(content.factors() if factors is None else factors, content.config)
    write_lora(
        directory,
        whole,
        base_model=content.base_model,
        target_modules=target_modules(content.config, layers_among(whole, content.config.target_parameters)),
        target_parameters=target_parameters(content.config, list(whole)),
        heads=content.heads,
        modules_to_save=content.config.modules_to_save if content.heads else None,
        fan_in_fan_out=content.conv1d,
        task_type=task_type,
        dtype=dtype,
    )


def write_lora(
    directory: str | Path,
    factors: Pairs,
    *,
    base_model: str | None,
    target_modules: list[str] | None = None,
    target_parameters: list[str] | None = None,
    heads: Mapping[str, Tensor] | None = None,
    modules_to_save: list[str] | None = None,
    fan_in_fan_out: bool = False,
    task_type: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write A (r, in) and B (out, r) by layer as a directory of plain LoRA.

    Args:
        directory: made; it must not exist, or be empty.
        factors: by the layers' full names in the model; ranks may differ.
        base_model: the base model's name, which AutoPeftModel and engines look at.
        target_modules: names or endings that stand for exactly these layers; their full names unless given.
        target_parameters: names or endings of the parameters that some factors are of experts in.
        heads: parameters of `modules_to_save` by their names in the model.
        modules_to_save: the names of the heads.
        fan_in_fan_out: the layers are transformers' Conv1D.
        task_type: PEFT's, such as "CAUSAL_LM".
        dtype: of the factors in the file.

    Raises:
        ValueError: no layers, factors that do not belong together, numbers that `dtype` cannot hold, or the directory
            is taken. Nothing is written then.
    """
    if not factors:
        raise ValueError("there are no layers to write as LoRA")
    r = max(a.shape[0] for a, _ in factors.values())
    tensors = {PREFIX + name: t for name, t in (heads or {}).items()}
    pairs = {name: padded(name, a, b, r, dtype) for name, (a, b) in factors.items()}
    for name, pair in stacked(pairs, target_parameters).items():
        tensors |= {f"{PREFIX}{name}.lora_{letter}.weight": t for letter, t in zip("AB", pair, strict=True)}
    settings: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "modules_to_save": modules_to_save,
        "peft_type": "LORA",
        "r": r,
        "revision": None,
        "target_modules": layers_among(factors, target_parameters) if target_modules is None else target_modules,
        **({"target_parameters": target_parameters} if target_parameters else {}),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    with new_directory(Path(directory)) as made:
        write_tensors(made / TENSOR_FILE, tensors, {})
        write_json(made / CONFIG_FILE, settings)


def stacked(pairs: Pairs, target_parameters: list[str] | None) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors with all experts of a parameter made into one pair, by the names that PEFT gives them.

    Raises:
        ValueError: an expert is missing, or not as large as the first.
    """
    result: dict[str, tuple[Tensor, Tensor]] = {}
    experts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, pair in pairs.items():
        parameter = parameter_of(name, target_parameters)
        if parameter is None:
            result[name] = pair
            continue
        of_parameter = experts.setdefault(parameter, [])
        if name != f"{parameter}.{len(of_parameter)}" or any(
            x.shape != y.shape for x, y in zip(pair, (of_parameter or [pair])[0], strict=True)
        ):
            raise ValueError(f"{name} is not the next expert of {parameter}, and of the first one's size")
        of_parameter.append(pair)
    names = _wrapped(list(experts))
    for parameter, of_parameter in experts.items():
        a = torch.cat([a for a, _ in of_parameter])  # (E r, in)
        b = torch.stack([b for _, b in of_parameter], dim=-1).flatten(1)  # (out, r, E) as (out, r E)
        result[names[parameter]] = a, b
    return result


def _wrapped(parameters: list[str]) -> dict[str, str]:
    """PEFT's names of wrapped parameters, of those of one module the last outermost."""
    by_module: dict[str, list[str]] = {}
    for parameter in parameters:
        by_module.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return {
        parameter: module + ".base_layer" * depth
        for module, own in by_module.items()
        for depth, parameter in enumerate(reversed(own))
    }


def whole_layers(factors: Pairs, config: AdapterConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors with the parts of each layer of `split_modules` made into one pair for the fused layer.

    Of p adapted parts, A_i (r, in) and B_i (out_i, r) each:

        A = [A_1; ...; A_p]              (p r, in)
        B = block-diagonal(B_1 ... B_p)  (out, p r), with rows of zeros for a part that is not adapted

    so that B A x has B_i A_i x in the outputs of part i.
    """
    result: dict[str, tuple[Tensor, Tensor]] = {}
    parts: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, pair in factors.items():
        layer, _, part = name.rpartition(".")
        if layer and split_key(layer, config) is not None:
            result[layer] = pair  # its place in the order
            parts.setdefault(layer, {})[part] = pair
        else:
            result[name] = pair
    for layer, of_layer in parts.items():
        key = split_key(layer, config)
        assert key is not None and config.split_modules is not None
        result[layer] = _fused(of_layer, config.split_modules[key])
    return result


def _fused(parts: dict[str, tuple[Tensor, Tensor]], names: list[str]) -> tuple[Tensor, Tensor]:
    """One pair for a layer whose equal parts have these names, of which some have a pair."""
    a = torch.cat([a for a, _ in parts.values()])  # (p r, in)
    width = next(iter(parts.values()))[1].shape[0]
    b = a.new_zeros(len(names) * width, len(a))  # (out, p r)
    column = 0
    for name, (_, part_b) in parts.items():
        row, rank = names.index(name) * width, part_b.shape[1]
        b[row : row + width, column : column + rank] = part_b
        column += rank
    return a, b


def target_modules(config: AdapterConfig, names: list[str]) -> list[str]:
    """What PEFT's rule makes exactly these layers of: the settings' own list where nothing narrows it down, else the
    layers' full names.

    (Some engines know endings such as "q_proj" alone, and people read them more easily.)
    """
    wanted = config.target_modules
    narrowed = (config.exclude_modules, config.layers_to_transform, config.split_modules, config.modules_to_save)
    if not isinstance(wanted, list) or any(setting is not None for setting in narrowed):
        return names
    ends = tuple(f".{ending}" for ending in wanted)
    return wanted if all(name in wanted or name.endswith(ends) for name in names) else names


def target_parameters(config: AdapterConfig, names: list[str]) -> list[str] | None:
    """What PEFT's rule makes exactly these experts of: the settings' own list, or the parameters' full names where some
    are trained in full and so are none of them."""
    if not config.modules_to_save or not config.target_parameters:
        return config.target_parameters
    found = (parameter_of(name, config.target_parameters) for name in names)
    return list(dict.fromkeys(parameter for parameter in found if parameter is not None))


def padded(name: str, a: Tensor, b: Tensor, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), filled up with zeros where their rank is lower."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{name}: A of shape {tuple(a.shape)} and B of shape {tuple(b.shape)} must be (r, in) and (out, r)"
        )
    missing = r - a.shape[0]
    pair = (
        torch.nn.functional.pad(a.detach().to("cpu", dtype), (0, 0, 0, missing)),
        torch.nn.functional.pad(b.detach().to("cpu", dtype), (0, missing)),
    )
    if not all(torch.isfinite(t).all() for t in pair):
        raise ValueError(f"{name}: its factors have numbers that {dtype} cannot hold: use another dtype")
    return pair
