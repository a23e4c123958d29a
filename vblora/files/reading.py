"""What the files of an adapter hold for a model: read and checked before the model is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from vblora.config import AdapterConfig
from vblora.files import match, packed
from vblora.files.content import Content, FileContent, check_heads
from vblora.files.directory import opened
from vblora.files.peft_format import BANK
from vblora.shapes import LayerShape
from vblora.targets import find_saved, find_targets, head_tensors, layer_shapes


class Found(NamedTuple):
    """An adapter in a file, with the layers of the model that it is for."""

    config: AdapterConfig
    targets: dict[str, nn.Module]
    saved: dict[str, nn.Module]
    content: FileContent


def read_for(model: nn.Module, path: Path) -> Found:
    """What a directory or a packed file holds for this model.

    Raises:
        ValueError: the files are damaged, hold something else, or do not fit the model.
    """
    if not path.is_file():
        return _read_directory(model, path)
    content = packed.read(path)
    saved = find_saved(model, content.config)
    targets = match.find_layers(model, content, path)
    read = _read_packed(content, path, layer_shapes(targets, content.config), saved)
    return Found(content.config, targets, saved, read)


def read_values(
    model: nn.Module,
    path: Path,
    config: AdapterConfig,
    shapes: Sequence[LayerShape],
    saved: dict[str, nn.Module] | None,
) -> FileContent:
    """The values for an adapter that is attached already, with these settings and layers.

    Raises:
        ValueError: as in `read_for`, or the file's settings are others.
    """
    names = {shape.name for shape in shapes}
    if path.is_file():
        content = packed.read(path)
        _require_settings(config, names, content.config, {shape.name for shape in content.shapes}, path)
        return _read_packed(content, path, shapes, saved)
    with opened(path) as found:
        _require_settings(config, names, found.config, set(find_targets(model, found.config)), path)
        return found.content(shapes, saved)


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
    return FileContent(native, {} if saved is None else content.heads, content.init_seed)


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
