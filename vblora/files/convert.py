"""Directories into packed files and back: `vblora pack` and `vblora unpack`, without the base model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from vblora.bank import select, topk_tensors
from vblora.base_weights import read_sample
from vblora.config import AdapterConfig, VBLoRAConfig
from vblora.files import packed, peft_format
from vblora.files.content import Content, check_tensors, form_of
from vblora.files.directory import FORMATS, HEAD_PREFIX, opened, seed_of, to_files, write_files
from vblora.files.layer_names import natural_order
from vblora.shapes import LayerShape, check_rank
from vblora.targets import find_targets, is_conv1d, layer_shapes


class Loss(NamedTuple):
    """What packing changed."""

    largest_error: float
    """The largest difference of an entry of a factor A or B."""
    largest_entry: float
    """The largest magnitude of an entry before, to compare it with."""


def pack_directory(
    directory: str | Path,
    file: str | Path,
    *,
    model: nn.Module | None = None,
    bank: str = "lossless",
    weights: str | int = "lossless",
    heads: str = "lossless",
    selection: str = "indices",
) -> Content:
    """Write the adapter in a directory as a packed file.

    Args:
        directory: what `save`, or PEFT's `save_pretrained`, wrote; of the full form the selection is kept.
        file: by convention NAME.vblora.safetensors.
        model: the base model; its weights may be on the meta device (`vblora.models.empty_model`). It is needed for
            our own format only, as PEFT's names every layer in its file.
        bank, weights, heads, selection: as in `packed.write`.

    Returns:
        What was in the directory.

    Raises:
        ValueError: the directory is damaged, or the model is needed or does not fit. Nothing is written then.
    """
    content = read_directory(directory, model)
    packed.write(content, file, bank=bank, weights=weights, heads=heads, selection=selection)
    return content


def unpack(file: str | Path, directory: str | Path, *, format: str = "auto") -> Content:
    """Write the adapter in a packed file as a directory in its top-k form, and return what was in the file.

    The directory names no task (PEFT's task_type), as a packed file has none.

    Args:
        file: a packed file.
        directory: made if missing.
        format: "peft", "native" or "auto", as in `vblora.save`.

    Raises:
        ValueError: the file is damaged, or the format cannot hold it. Nothing is written then.
    """
    if format not in FORMATS:
        raise ValueError(f"format is one of {', '.join(FORMATS)}, not {format!r}")
    content = packed.read(file)
    write_files(directory, *to_files(content, format), content, card=True)
    return content


def compare(before: Content, after: Content) -> Loss | None:
    """How far the factors of two adapters on the same layers are apart; None for LoRA-XS, whose need the model."""
    if before.config.method == "lora_xs":
        return None
    ours, theirs = before.factors(), after.factors()
    pairs = [(a, b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True)]
    return Loss(max(float((a - b).abs().max()) for a, b in pairs), max(float(a.abs().max()) for a, _ in pairs))


def read_directory(directory: str | Path, model: nn.Module | None = None) -> Content:
    """The adapter in a directory (or in a packed file), in its top-k form, as `packed.write` takes it.

    Raises:
        ValueError: as in `pack_directory`.
    """
    directory = Path(directory)
    if directory.is_file():
        return packed.read(directory)
    with opened(directory) as found:
        tensors, settings, config = found.tensors(), found.settings, found.config
    try:
        shapes, conv1d = _layers(tensors, config, found.is_peft, settings, model)
        check_rank(config.r, shapes)
        native, heads = found.split(tensors, shapes)
        check_tensors(native, config.spec(shapes, form_of(native)))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    base_name = settings.get("base_model_name_or_path") or getattr(
        getattr(model, "config", None), "_name_or_path", None
    )
    return Content(
        config,
        shapes,
        _topk_form(native, config, directory),
        heads,
        base_name if isinstance(base_name, str) and base_name else None,
        seed_of(found.metadata),
        conv1d,
        base_sample=read_sample(found.metadata),
    )


def _topk_form(native: dict[str, Tensor], config: AdapterConfig, directory: Path) -> dict[str, Tensor]:
    if "logits" not in native:
        return native
    if type(config) is not VBLoRAConfig:
        raise ValueError(
            f"{directory} holds all of {config.method}: save its top-k form, which is VB-LoRA's, and pack it"
        )
    values, indices = select(native["logits"].float(), config.topk)
    return topk_tensors(native["vector_bank"], indices, values)


# --- Which layers they are ------------------------------------------------------------------------------------------


def _layers(
    tensors: dict[str, Tensor], config: AdapterConfig, is_peft: bool, settings: dict[str, Any], model: nn.Module | None
) -> tuple[list[LayerShape], bool]:
    """The adapted layers, and whether they are transformers' Conv1D."""
    if model is not None:
        targets = find_targets(model, config)
        return layer_shapes(targets, config), any(is_conv1d(module) for module in targets.values())
    if not is_peft:
        raise ValueError(
            "this format names no layers: give the base model's folder or name "
            "(vblora pack DIR FILE --model MODEL; of its weights nothing is read)"
        )
    assert isinstance(config, VBLoRAConfig)
    return _named_layers(tensors, config), settings.get("fan_in_fan_out") is True


def _named_layers(tensors: dict[str, Tensor], config: VBLoRAConfig) -> list[LayerShape]:
    """The layers of PEFT's file: in it, b divides every width, so the numbers of sub-vectors give the widths."""
    tiles: dict[str, dict[str, int]] = {}
    for key, tensor in tensors.items():
        name, marker, ending = key.partition(".vblora_logits_")
        if marker and ending in ("A", "B", "A_topk_indices", "B_topk_indices") and tensor.dim() == 3:
            factor = ending[0]
            tiles.setdefault(name.removeprefix(peft_format.PREFIX), {})[factor] = tensor.shape[factor == "A"]
    for name, found in tiles.items():
        if len(found) != 2:
            raise ValueError(f"{name} has only one of its two factors, A and B")
    if not tiles:
        raise ValueError("the file has no adapted layer")
    names = sorted(tiles, key=natural_order)
    listed = config.target_modules
    if isinstance(listed, list) and set(listed) == set(names):  # by full names, in the model's order
        names = list(dict.fromkeys(listed))
    b = config.vector_length
    return [LayerShape(name, tiles[name]["A"] * b, tiles[name]["B"] * b) for name in names]


def settings_and_heads(directory: Path) -> tuple[AdapterConfig, set[str]]:
    """The settings in a directory, and the names of its heads' parameters in the model.

    Raises:
        ValueError: as in `read_directory`.
    """
    with opened(directory) as found:
        config, is_peft, names = found.config, found.is_peft, found.names
    if not is_peft:
        return config, {key.removeprefix(HEAD_PREFIX) for key in names if key.startswith(HEAD_PREFIX)}
    prefix = peft_format.PREFIX
    heads = (key for key in names if key.startswith(prefix) and ".vblora_logits_" not in key)
    return config, {key.removeprefix(prefix) for key in heads}
