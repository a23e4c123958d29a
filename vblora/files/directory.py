"""Saving and loading adapters.

A directory holds adapter_config.json and adapter_model.safetensors. VB-LoRA is written as PEFT's VBLoRA
wherever that format can hold it; everything else in a format of our own of the same two files:

    adapter_config.json         {"vblora_method": "tied_lora", ...the settings}
    adapter_model.safetensors   the method's tensors by their names, and "head.<parameter>" for heads

A model card, README.md (vblora.files.card), is for people and the hub, and never read.

The second is all of an adapter: its metadata have the settings too, and a checksum over both. So it is what we read,
and what PEFT reads, adapter_config.json, follows it.

Two forms: "topk" (indices and weights of the selection: what one keeps) and "full" (all logits: what one needs
to go on training exactly). The other methods have one form. A packed file (vblora.files.packed) holds the top-k form
in one small file, and is read wherever a directory is.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vblora import container
from vblora.bank import smallest_index_dtype
from vblora.base_weights import read_sample
from vblora.config import FORMS, AdapterConfig, VBLoRAConfig
from vblora.container import TensorFile
from vblora.files import peft_format
from vblora.files.card import CARD_FILE, card_of, is_foreign, written
from vblora.files.content import Content, FileContent, check_floats, check_heads, check_tensors, form_of
from vblora.io import alone_in, is_being_replaced, json_text, read_json, replacing, write_json, write_tensors
from vblora.shapes import LayerShape, check_rank
from vblora.targets import head_tensors

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
METHOD_KEY = "vblora_method"
# In the metadata of the tensor file, which other readers ignore.
SETTINGS = "vblora_settings"
CHECKSUM = "vblora_sha256"
HEAD_PREFIX = "head."
FORMATS = ("auto", "peft", "native")


def write_directory(content: Content, directory: str | Path, format: str = "auto", card: bool = True) -> None:
    """Write an adapter into a directory, with a model card if wanted; what was there is replaced in one step.

    Raises:
        ValueError: no such format, one that cannot hold this adapter, or a tensor holds NaN or infinite numbers, which
            no reader would take; or the card cannot be written. What was there stays.
    """
    if format not in FORMATS:
        raise ValueError(f"format is one of {', '.join(FORMATS)}, not {format!r}")
    for name, tensor in {**content.tensors, **content.heads}.items():
        if tensor.is_floating_point():
            check_floats(name, tensor)
    write_files(directory, *to_files(content, format), content, card)


def to_files(content: Content, format: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the two files of a directory hold: the settings, and the tensors by their names there."""
    config, shapes, native = content.config, content.shapes, content.tensors
    if "topk_indices" in native:
        assert isinstance(config, VBLoRAConfig)
        native = {**native, "topk_indices": native["topk_indices"].to(smallest_index_dtype(config.num_vectors))}
    if _use_peft(config, shapes, format):
        assert isinstance(config, VBLoRAConfig)
        settings = peft_format.to_peft_config(
            config, shapes, form_of(native), content.conv1d, content.base_model, content.task_type
        )
        tensors = peft_format.to_peft(native, config, shapes)
        head_prefix = peft_format.PREFIX
    else:
        settings = {METHOD_KEY: config.method, **config.to_dict()}
        tensors = dict(native)
        head_prefix = HEAD_PREFIX
    return settings, tensors | {head_prefix + name: t for name, t in content.heads.items()}


def write_files(
    directory: str | Path,
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    content: Content,
    card: bool,
) -> None:
    """Write the files of a directory, one save at a time; of the content only what is not in these is looked at.

    The tensors' file holds the settings too, with a checksum over both, so that the save is done in the one step that
    puts it in its place. adapter_config.json, which PEFT reads, lies ready beside it then and follows.
    """
    directory = Path(directory)
    text = json_text(directory / CONFIG_FILE, settings)
    wanted = card and not is_foreign(directory / CARD_FILE)
    metadata = {} if content.init_seed is None else {"init_seed": str(content.init_seed)}
    metadata |= {} if content.base_sample is None else content.base_sample.metadata()
    if METHOD_KEY not in settings:
        metadata |= peft_format.start_metadata(content.config)
    metadata[SETTINGS] = json.dumps({k: v for k, v in settings.items() if v is not None}, sort_keys=True)
    metadata[CHECKSUM] = pair_checksum(_own_settings(metadata)[0], tensors, metadata)
    with alone_in(directory):
        _finish_interrupted(directory)
        with (
            written(directory / CARD_FILE, card_of(content, METHOD_KEY not in settings)) if wanted else nullcontext(),
            replacing(directory / CONFIG_FILE) as ready,
        ):
            ready.write_text(text, encoding="utf-8")
            write_tensors(directory / TENSOR_FILE, tensors, metadata)


def _finish_interrupted(directory: Path) -> None:
    """Write the adapter_config.json of a save that was killed before it came to that."""
    with suppress(ValueError), opened(directory) as found:  # no adapter is there, or a damaged one
        if found.interrupted:
            write_json(directory / CONFIG_FILE, found.settings)


# --- Reading ------------------------------------------------------------------------------------------------------


class TornPair(ValueError):
    """The two files of a directory are not of one save, or one is damaged."""


class Directory:
    """An adapter's directory: its settings, read, and its file of tensors, open.

    What it gives is of one save, also when another process saves into the directory meanwhile.

    Attributes:
        config: the settings.
        is_peft: the format is PEFT's VBLoRA.
        settings: as they stand in adapter_config.json.
        interrupted: the save has not come to its adapter_config.json, or another one is under way.
    """

    def __init__(self, path: Path, file: TensorFile) -> None:
        self.path, self._file = path, file
        self.metadata = file.metadata
        self.settings, self.interrupted = self._find_settings()
        self.config, self.is_peft = _parse_config(self.settings, self.metadata)

    @property
    def names(self) -> list[str]:
        """The tensors' names in the file."""
        return list(self._file.entries)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names in the file.

        Raises:
            ValueError: the checksum is another. (PEFT's files, and those of version 0.1, have none.)
        """
        tensors = self._file.tensors()
        if CHECKSUM in self.metadata and self.metadata[CHECKSUM] != pair_checksum(self.config, tensors, self.metadata):
            raise TornPair(
                f"{self._file.path} does not belong to the {CONFIG_FILE} beside it, or is damaged: "
                "the checksum is another; save it again"
            )
        return tensors

    def content(self, shapes: Sequence[LayerShape], saved: dict[str, nn.Module] | None) -> FileContent:
        """The tensors by our names, checked, and the heads for these modules; none where that is None.

        Raises:
            ValueError: as in `tensors`, or something is missing, unknown or of another shape.
        """
        try:
            check_rank(self.config.r, shapes)
            wanted = None if saved is None else head_tensors(saved)
            if wanted is not None:
                self._check_size(shapes, wanted)
            tensors, sample = self.tensors(), read_sample(self.metadata)
            native, heads = self.split(tensors, shapes)
            check_tensors(native, self.config.spec(shapes, form_of(native)))
            if wanted is not None:
                check_heads(heads, wanted)
        except TornPair:
            raise
        except ValueError as error:
            raise ValueError(f"{self._file.path}: {error}") from error
        return FileContent(native, {} if saved is None else heads, seed_of(self.metadata), sample)

    def split(
        self, tensors: dict[str, Tensor], shapes: Sequence[LayerShape]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The adapter's tensors and the heads', by our names."""
        if self.is_peft:
            assert isinstance(self.config, VBLoRAConfig)
            rest = dict(tensors)
            native = peft_format.from_peft(rest, self.config, shapes)
            return native, {key.removeprefix(peft_format.PREFIX): t for key, t in rest.items()}
        native = {key: t for key, t in tensors.items() if not key.startswith(HEAD_PREFIX)}
        return native, {key.removeprefix(HEAD_PREFIX): t for key, t in tensors.items() if key not in native}

    def _check_size(self, shapes: Sequence[LayerShape], wanted: Mapping[str, Tensor]) -> None:
        """Refuse a file that is larger than all that could be in it, before it is read."""
        specs = [spec for form in FORMS for spec in self.config.spec(shapes, form).values()]
        numbers = sum(math.prod(spec.shape) for spec in specs) + sum(tensor.numel() for tensor in wanted.values())
        found = max((entry.stop for entry in self._file.entries.values()), default=0)
        if found > 8 * numbers + 2**20:  # names are looked at later
            raise ValueError(
                f"it has {found:,} bytes of tensors; this model and these settings need {numbers:,} numbers"
            )

    def _find_settings(self) -> tuple[dict[str, Any], bool]:
        """The settings of this save, and whether adapter_config.json has others because one is under way or was killed.

        A save makes adapter_config.json ready in a temporary file, then replaces the tensors, then moves that file. So
        where the settings beside are others than these tensors', and neither is a temporary file there nor have the
        tensors been replaced meanwhile, somebody else has changed them.
        """
        path = self.path / CONFIG_FILE
        if SETTINGS not in self.metadata:
            return read_json(path), False
        if CHECKSUM not in self.metadata:
            raise ValueError(f"{self._file.path} has settings in its metadata and no {CHECKSUM}: it is damaged")
        own, busy = _own_settings(self.metadata), is_being_replaced(path)
        if path.exists():
            beside = read_json(path)
            if _understood(path, beside, self.metadata) == own:
                return beside, False
            if not busy and self._file.is_current():
                raise TornPair(
                    f"{self._file.path} does not belong to the {CONFIG_FILE} beside it, whose settings are others: put "
                    "back those it was saved with, or save it again"
                )
        return json.loads(self.metadata[SETTINGS]), True


@contextmanager
def opened(directory: str | Path) -> Iterator[Directory]:
    """The adapter in a directory; its tensors can be read within the block.

    Raises:
        ValueError: no adapter of ours or of PEFT's VBLoRA is there, or one of its files is damaged.
    """
    directory = Path(directory)
    if not directory.exists():
        raise ValueError(f"{directory} does not exist: name the folder of an adapter, or a packed file")
    config, tensors = directory / CONFIG_FILE, directory / TENSOR_FILE
    if not tensors.exists():
        _understood(config, read_json(config), {})  # what is wrong with it comes first
    with container.opened(tensors) as file:
        yield Directory(directory, file)


def read_config(directory: Path) -> tuple[AdapterConfig, bool]:
    """The settings in a directory, and whether it is PEFT's format.

    Raises:
        ValueError: as in `opened`.
    """
    with opened(directory) as found:
        return found.config, found.is_peft


def pair_checksum(config: AdapterConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the settings as they are understood, the seed, and each tensor's name, type, shape and bytes.

    Settings at their default do not count, so that a later version's new setting leaves the checksum what it was.
    """
    usual = {field.name: field.default for field in fields(config)}
    settings = {name: value for name, value in config.to_dict().items() if value != usual[name]}
    digest = hashlib.sha256()
    digest.update(json.dumps([config.method, settings, metadata.get("init_seed")], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def seed_of(metadata: dict[str, str]) -> int | None:
    """The recorded seed, if it is one that PyTorch takes."""
    text = metadata.get("init_seed", "")
    seed = int(text) if re.fullmatch(r"-?\d{1,20}", text) else None
    return seed if seed is not None and -(2**63) <= seed < 2**64 else None


def _own_settings(metadata: Mapping[str, str]) -> tuple[AdapterConfig, bool]:
    """The settings in a file of tensors."""
    settings = container.parse_json(metadata[SETTINGS])
    if not isinstance(settings, dict):
        raise ValueError(f"the {SETTINGS} in its metadata are no JSON object: the file is damaged")
    return _understood(Path(TENSOR_FILE), settings, metadata)


def _understood(path: Path, settings: dict[str, Any], metadata: Mapping[str, str]) -> tuple[AdapterConfig, bool]:
    """As `_parse_config`; errors name the file."""
    try:
        return _parse_config(settings, metadata)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _parse_config(values: dict[str, Any], metadata: Mapping[str, str]) -> tuple[AdapterConfig, bool]:
    by_name = AdapterConfig.known
    values = dict(values)
    if METHOD_KEY in values:
        method = values.pop(METHOD_KEY)
        if not isinstance(method, str) or method not in by_name:
            raise ValueError(f"{METHOD_KEY} is {method!r}, not one of {', '.join(sorted(by_name))}")
        return by_name[method].from_dict(values), False
    if values.get("peft_type") == "VBLORA":
        return peft_format.with_start(peft_format.from_peft_config(values), metadata), True
    raise ValueError(
        f"peft_type is {values.get('peft_type')!r}: only VBLORA is loaded here; "
        "load adapters of other methods with peft.PeftModel.from_pretrained"
    )


def _use_peft(config: AdapterConfig, shapes: Sequence[LayerShape], format: str) -> bool:
    if type(config) is not VBLoRAConfig:
        reason: str | None = f"PEFT has no format for {config.method}"
    else:
        reason = peft_format.obstacle(config, shapes)
    if format == "peft" and reason is not None:
        raise ValueError(f'PEFT\'s format cannot hold this adapter: {reason}; use format="native"')
    if format == "auto" and reason is not None and type(config) is VBLoRAConfig:
        _warn_of_misfits(config, shapes, reason)
    return format != "native" and reason is None


def _warn_of_misfits(config: VBLoRAConfig, shapes: Sequence[LayerShape], reason: str) -> None:
    """A few layers, such as a gate of one output, may keep the others from PEFT's format, and nobody means it."""
    few = peft_format.misfits(config, shapes)
    if not config.split_modules and not config.target_parameters and 0 < len(few) < len(shapes):
        warnings.warn(
            f"the adapter is saved in the native format, which PEFT cannot read, for {len(few)} of its {len(shapes)} "
            f'layers: {reason}. exclude_modules leaves them out; format="native" says that it is meant',
            stacklevel=6,
        )
