"""What the files of an adapter hold for a model: read and checked before the model is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from vblora.base_weights import check_base, take_sample
from vblora.config import AdapterConfig
from vblora.files import match, packed
from vblora.files.content import Content, FileContent, check_heads
from vblora.files.directory import opened
from vblora.files.peft_format import BANK
from vblora.shapes import LayerShape
from vblora.targets import find_saved, find_targets, head_tensors, layer_shapes, output_slice


class Found(NamedTuple):
    """An adapter in a file, with the layers of the model that it is for."""

    config: AdapterConfig
    targets: dict[str, nn.Module]
    saved: dict[str, nn.Module]
    content: FileContent


def read_for(model: nn.Module, path: Path, strict_base: bool = False) -> Found:
    """What a directory or a packed file holds for this model; `strict_base` as in `vblora.load`.

    Raises:
        ValueError: the files are damaged, hold something else, or do not fit the model.
    """
    found = _read_packed_for(model, path) if path.is_file() else _read_directory(model, path)
    _check_base(model, found, path, strict_base)
    return found


def _read_packed_for(model: nn.Module, path: Path) -> Found:
    content = packed.read_for(model, path)
    saved = find_saved(model, content.config)
    targets = match.find_layers(model, content, path)
    read = _read_packed(content, path, layer_shapes(targets, content.config), saved)
    return Found(content.config, targets, saved, read)


def read_values(
    model: nn.Module,
    path: Path,
    config: AdapterConfig,
    targets: dict[str, nn.Module],
    saved: dict[str, nn.Module] | None,
) -> FileContent:
    """The values for an adapter that is attached already, with these settings and layers.

    Raises:
        ValueError: as in `read_for`, or the file's settings are others.
    """
    shapes = layer_shapes(targets, config)
    if path.is_file():
        content = packed.read_for(model, path)
        _require_settings(config, set(targets), content.config, {shape.name for shape in content.shapes}, path)
        read = _read_packed(content, path, shapes, saved)
    else:
        with opened(path) as found:
            _require_settings(config, set(targets), found.config, set(find_targets(model, found.config)), path)
            read = found.content(shapes, saved)
    _check_base(model, Found(config, targets, saved or {}, read), path, strict=False)
    return read


def read_bank(source: str | Path) -> Tensor:
    """The bank (h, b) of an adapter: of a directory, ours or PEFT's, or of a packed file.

    Raises:
        ValueError: no adapter is there, or one without a bank.
    """
    path = Path(source)
    if path.is_file():
        tensors = packed.read(path).tensors
    else:
        with opened(path) as found:
            tensors = found.tensors()
    banks = [tensor for name, tensor in tensors.items() if name in ("vector_bank", BANK)]
    if len(banks) != 1 or banks[0].ndim != 2 or not banks[0].is_floating_point():
        raise ValueError(f"{path} holds no vector bank")
    return banks[0]


def _read_directory(model: nn.Module, path: Path) -> Found:
    with opened(path) as found:
        targets, saved = find_targets(model, found.config), find_saved(model, found.config)
        content = found.content(layer_shapes(targets, found.config), saved)
        return Found(found.config, targets, saved, content)


def _read_packed(
    content: Content, path: Path, shapes: Sequence[LayerShape], saved: dict[str, nn.Module] | None
) -> FileContent:
    """A packed file's content in the order of these layers; its own tensors are checked already."""
    try:
        native = match.in_order_of(content, shapes)
        if saved is not None:
            check_heads(content.heads, head_tensors(saved))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return FileContent(native, {} if saved is None else content.heads, content.init_seed, content.base_sample)


def _check_base(model: nn.Module, found: Found, path: Path, strict: bool) -> None:
    """Compare the base model that the file was made on with this one."""
    shapes = layer_shapes(found.targets, found.config)
    outputs = {name: output_slice(name, module, found.config) for name, module in found.targets.items()}
    own = take_sample(model, found.targets, shapes, outputs)
    check_base(found.content.base_sample, own, shapes, str(path), strict)


def _require_settings(
    config: AdapterConfig, names: set[str], theirs: AdapterConfig, their_names: set[str], path: Path
) -> None:
    """Refuse a file of other settings than the adapter's; its layers may be named in another way."""
    ours, found = config.to_dict(), theirs.to_dict()
    if names == their_names:
        found["target_modules"] = ours["target_modules"]
    if type(config) is not type(theirs) or ours != found:
        changed = [key for key in ours if ours[key] != found.get(key)]
        raise ValueError(f"{path} has other settings than this run: {', '.join(changed) or theirs.method}")
