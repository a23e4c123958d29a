"""Saving and loading adapters.

A directory holds adapter_config.json and adapter_model.safetensors. VB-LoRA is written as PEFT's VBLoRA
wherever that format can hold it; everything else in a format of our own of the same two files:

    adapter_config.json         {"vblora_method": "tied_lora", ...the settings}
    adapter_model.safetensors   the method's tensors by their names, and "head.<parameter>" for heads

Two forms: "topk" (indices and weights of the selection: what one keeps) and "full" (all logits: what one needs
to go on training exactly). The other methods have one form. A packed file (vblora.storage.packed) holds the top-k form
in one small file, and is read wherever a directory is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vblora.adapter import Adapter, TensorSpec, install
from vblora.bank import smallest_index_dtype
from vblora.config import AdapterConfig
from vblora.counting import LayerShape
from vblora.methods.vb_lora import VBLoRA, VBLoRAConfig
from vblora.storage import peft_format
from vblora.storage.files import (
    describe_dtype,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from vblora.targets import find_saved, find_targets, is_conv1d, layer_shapes

if TYPE_CHECKING:
    from vblora.storage.packed import Packed

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
METHOD_KEY = "vblora_method"
HEAD_PREFIX = "head."
FORMS = ("topk", "full")
FORMATS = ("auto", "peft", "native")


def save(adapter: Adapter, directory: str | Path, *, form: str = "topk", format: str = "auto") -> None:
    """Write an adapter, with its `modules_to_save`, into a directory.

    Args:
        adapter: the adapter, attached to its model.
        directory: made if missing; an adapter in it is replaced, each file in one step.
        form: "topk" to keep and use; "full" to go on training.
        format: "peft" for PEFT's VBLoRA files, "native" for our own, "auto" for PEFT's where it fits.

    Raises:
        ValueError: a form or format that cannot hold this adapter. Nothing is written then.
    """
    if form not in FORMS or format not in FORMATS:
        raise ValueError(f"form is one of {FORMS} and format one of {FORMATS}, not {form!r} and {format!r}")
    model, _ = adapter._require_home()
    native = adapter.tensors(form)
    conv1d = any(is_conv1d(module) for module in adapter.targets.values())
    base_name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    files = to_files(
        adapter.kept_config(form), adapter.shapes, native, head_tensors(adapter.saved), conv1d, base_name, format
    )
    write_files(directory, *files, adapter.init_seed)


def to_files(
    config: AdapterConfig,
    shapes: Sequence[LayerShape],
    native: dict[str, Tensor],
    heads: dict[str, Tensor],
    conv1d: bool,
    base_name: str | None,
    format: str,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the two files of a directory hold: the settings, and the tensors by their names there."""
    if "topk_indices" in native:
        assert isinstance(config, VBLoRAConfig)
        native = {**native, "topk_indices": native["topk_indices"].to(smallest_index_dtype(config.num_vectors))}
    if _use_peft(config, shapes, format):
        assert isinstance(config, VBLoRAConfig)
        settings = peft_format.to_peft_config(config, shapes, form_of(native), conv1d, base_name)
        tensors = peft_format.to_peft(native, config, shapes)
        head_prefix = peft_format.PREFIX
    else:
        settings = {METHOD_KEY: config.method, **config.to_dict()}
        tensors = dict(native)
        head_prefix = HEAD_PREFIX
    return settings, tensors | {head_prefix + name: t for name, t in heads.items()}


def write_files(
    directory: str | Path, settings: dict[str, Any], tensors: dict[str, Tensor], init_seed: int | None
) -> None:
    metadata = {} if init_seed is None else {"init_seed": str(init_seed)}
    write_tensors(Path(directory) / TENSOR_FILE, tensors, metadata)
    write_json(Path(directory) / CONFIG_FILE, settings)


def load(model: nn.Module, directory: str | Path, *, name: str | None = None, trainable: bool = False) -> Adapter:
    """Attach to `model` the adapter in a directory or a packed file, in any form that this project or PEFT's VBLoRA
    writes.

    Everything is checked before the model is touched.

    Args:
        model: the base model the adapter was trained on.
        directory: what `save`, or PEFT's `save_pretrained`, wrote; or a packed file.
        name: attribute of the model that will hold the adapter; as in `attach`.
        trainable: have VB-LoRA's logits that a top-k form lacks drawn again, so that it can be trained on: see
            `VBLoRA.redraw_logits`. The seed is the recorded one, or 0 where there is none (PEFT's files).

    Raises:
        ValueError: the files are damaged, hold something else, or do not fit the model; the message names
            what is wrong. The model is as it was.
    """
    path = Path(directory)
    if path.is_file():
        from vblora.storage import fitting, packed  # they build on this module

        content = packed.read(path)
        config, saved = content.config, find_saved(model, content.config)
        targets = fitting.find_layers(model, content, path)
        read = _read_packed(content, path, layer_shapes(targets, config), saved)
    else:
        config, is_peft = read_config(path)
        targets, saved = find_targets(model, config), find_saved(model, config)
        read = _read_content(path, config, is_peft, layer_shapes(targets, config), saved)
    with torch.inference_mode(False):
        adapter = install(model, Adapter.methods[type(config)](config, targets, None), name, saved)
    _take_over(adapter, read, redraw=trainable)
    return adapter


def restore(adapter: Adapter, directory: str | Path, *, heads: bool = True, redraw: bool = False) -> None:
    """Put the values in a directory, or a packed file, into an adapter that is attached already, as when training is
    resumed.

    Without `heads` the `modules_to_save` stay as they are, as when another task starts from this adapter. VB-LoRA's
    top-k form lacks most logits: with `redraw` they are drawn again, as in `load(..., trainable=True)`.

    Raises:
        ValueError: as in `load`, or the settings differ, or it is the top-k form. The adapter is as it was.
    """
    path = Path(directory)
    saved = adapter.saved if heads else None
    if path.is_file():
        from vblora.storage import packed

        content = packed.read(path)
        _require_settings(adapter, content.config, path, {shape.name for shape in content.shapes})
        read = _read_packed(content, path, adapter.shapes, saved)
    else:
        config, is_peft = read_config(path)
        model, _ = adapter._require_home()
        _require_settings(adapter, config, path, set(find_targets(model, config)))
        read = _read_content(path, config, is_peft, adapter.shapes, saved)
    if isinstance(adapter.config, VBLoRAConfig) and form_of(read.native) != "full" and not redraw:
        raise ValueError(
            f'{path} holds the top-k form; to train on it must be the full one (form="full"), '
            "or its missing logits drawn again (redraw=True)"
        )
    _take_over(adapter, read, redraw)


def _require_settings(adapter: Adapter, config: AdapterConfig, path: Path, names: set[str]) -> None:
    """Refuse a file of other settings than the adapter's; its layers may be named in another way."""
    ours, theirs = adapter.config.to_dict(), config.to_dict()
    if names == set(adapter.targets):
        theirs["target_modules"] = ours["target_modules"]
    if type(config) is not type(adapter.config) or ours != theirs:
        changed = [key for key in ours if ours[key] != theirs.get(key)]
        raise ValueError(f"{path} has other settings than this run: {', '.join(changed) or config.method}")


class _Content(NamedTuple):
    """A file's tensors under our names, its heads, and the seed of its initial values; all of it checked."""

    native: dict[str, Tensor]
    heads: dict[str, Tensor]
    init_seed: int | None


def _read_content(
    directory: Path,
    config: AdapterConfig,
    is_peft: bool,
    shapes: Sequence[LayerShape],
    saved: dict[str, nn.Module] | None,
) -> _Content:
    path = directory / TENSOR_FILE
    tensors, metadata = read_tensors(path)
    try:
        if is_peft:
            assert isinstance(config, VBLoRAConfig)
            native = peft_format.from_peft(tensors, config, shapes)
            heads = {key.removeprefix(peft_format.PREFIX): t for key, t in tensors.items()}
        else:
            native = {key: t for key, t in tensors.items() if not key.startswith(HEAD_PREFIX)}
            heads = {key.removeprefix(HEAD_PREFIX): t for key, t in tensors.items() if key not in native}
        check_tensors(native, Adapter.methods[type(config)].spec(config, shapes, form_of(native)))
        if saved is None:
            heads = {}
        else:
            check_heads(heads, head_tensors(saved))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _Content(native, heads, seed_of(metadata))


def seed_of(metadata: dict[str, str]) -> int | None:
    """The recorded seed, if it is one that PyTorch takes."""
    text = metadata.get("init_seed", "")
    seed = int(text) if re.fullmatch(r"-?\d{1,20}", text) else None
    return seed if seed is not None and -(2**63) <= seed < 2**64 else None


def _read_packed(
    content: Packed, path: Path, shapes: Sequence[LayerShape], saved: dict[str, nn.Module] | None
) -> _Content:
    """A packed file's content in the order of these layers; its own tensors are checked already."""
    from vblora.storage import fitting

    try:
        native = fitting.in_order_of(content, shapes)
        if saved is not None:
            check_heads(content.heads, head_tensors(saved))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _Content(native, {} if saved is None else content.heads, content.init_seed)


def _take_over(adapter: Adapter, content: _Content, redraw: bool) -> None:
    adapter.init_seed = content.init_seed
    adapter._composed = None
    with torch.inference_mode(False):
        adapter.load_tensors(content.native)
        if redraw and isinstance(adapter, VBLoRA) and adapter.logits is None:
            adapter.init_seed = content.init_seed or 0
            adapter.redraw_logits(adapter.init_seed)
    own = head_tensors(adapter.saved)
    with torch.no_grad():
        for key, tensor in content.heads.items():
            own[key].copy_(tensor)


def read_config(directory: Path) -> tuple[AdapterConfig, bool]:
    """The settings in a directory, and whether it is PEFT's format.

    Raises:
        ValueError: no adapter of ours or of PEFT's VBLoRA is there.
    """
    path = directory / CONFIG_FILE
    values = read_json(path)
    by_name = {c.method: c for c in Adapter.methods}
    try:
        if METHOD_KEY in values:
            method = values.pop(METHOD_KEY)
            if not isinstance(method, str) or method not in by_name:
                raise ValueError(f"{METHOD_KEY} is {method!r}, not one of {', '.join(sorted(by_name))}")
            return by_name[method].from_dict(values), False
        if values.get("peft_type") == "VBLORA":
            return peft_format.from_peft_config(values), True
        raise ValueError(
            f"peft_type is {values.get('peft_type')!r}: only VBLORA is loaded here; "
            "load adapters of other methods with peft.PeftModel.from_pretrained"
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def form_of(native: dict[str, Tensor]) -> str:
    """Which form these tensors of an adapter are."""
    return "topk" if native.keys() & {"topk_indices", "topk_weights"} else "full"


def check_tensors(tensors: dict[str, Tensor], specs: dict[str, TensorSpec]) -> None:
    """Check names, shapes, kinds of number and values against what a file of this form must hold.

    Raises:
        ValueError: naming the first tensor that is wrong, and how.
    """
    if missing := [name for name in specs if name not in tensors]:
        raise ValueError(f"tensors missing: {', '.join(missing)}")
    if unknown := [name for name in tensors if name not in specs]:
        raise ValueError(f"tensors that belong to nothing: {', '.join(unknown[:5])}")
    for name, spec in specs.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this model and configuration need {spec.shape}")
        if spec.below is None:
            check_floats(name, tensor)
        else:
            _check_indices(name, tensor, spec.below)
    if "topk_weights" in tensors:
        check_weights(tensors["topk_weights"])


def check_floats(name: str, tensor: Tensor) -> None:
    """Refuse anything but finite floating point numbers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} holds {describe_dtype(tensor)}, not floating point numbers")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinite numbers")


def _check_indices(name: str, tensor: Tensor, below: int) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} holds {describe_dtype(tensor)}, not whole numbers")
    values = tensor.long()
    if values.numel() and (values.min() < 0 or values.max() >= below):
        raise ValueError(f"{name} has an index outside 0 to {below - 1}")
    ordered = values.sort(dim=-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(f"{name} selects the same vector twice for one sub-vector")


def check_weights(weights: Tensor) -> None:
    """Each row is the first k - 1 of k weights that are at least 0 and sum to 1 (up to rounding)."""
    slack = 1e-2 if weights.dtype in (torch.float16, torch.bfloat16) else 1e-5
    values = weights.float()
    if values.numel() and (values.min() < -slack or values.sum(dim=-1).max() > 1 + slack):
        raise ValueError("topk_weights has a row that is no mixture: weights below 0, or a sum above 1")


def _use_peft(config: AdapterConfig, shapes: Sequence[LayerShape], format: str) -> bool:
    if type(config) is not VBLoRAConfig:
        reason: str | None = f"PEFT has no format for {config.method}"
    else:
        reason = peft_format.obstacle(config, shapes)
    if format == "peft" and reason is not None:
        raise ValueError(f'PEFT\'s format cannot hold this adapter: {reason}; use format="native"')
    return format != "native" and reason is None


def head_tensors(saved: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the modules trained in full, by their names in the model."""
    return {f"{name}.{key}": t for name, module in saved.items() for key, t in module.state_dict().items()}


def check_heads(heads: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Check the names, shapes and numbers of a file's heads against those of the model (see `head_tensors`).

    Raises:
        ValueError: naming what is missing, unknown or wrong.
    """
    if missing := [key for key in wanted if key not in heads]:
        raise ValueError(f"the model's {', '.join(missing)} are not in the file (modules_to_save)")
    if unknown := [key for key in heads if key not in wanted]:
        raise ValueError(f"tensors that belong to no layer of this model: {', '.join(unknown[:5])}")
    for key, tensor in heads.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}; the model has {tuple(wanted[key].shape)}")
        if wanted[key].is_floating_point():
            check_floats(key, tensor)
