"""Modules under the names that they had in version 0.1: `vblora.storage.packed` is `vblora.files.packed` now.

Old imports go on working, with a DeprecationWarning that names the new place. `vblora` installs the finder below when
it is imported; the table is all there is to keep.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "vblora.counting": "vblora.counts",
    "vblora.paper_counts": "vblora_experiments.paper_counts",
    "vblora.methods.switch": "vblora.switch",
    "vblora.methods.peft_bridge": "vblora.methods.through_peft",
    "vblora.methods.vb_lora_selection": "vblora.methods.selection_rules",
    "vblora.storage": "vblora.files.directory",
    "vblora.storage.coding": "vblora.files.encoding",
    "vblora.storage.container": "vblora.container",
    "vblora.storage.decoding": "vblora.files.decoding",
    "vblora.storage.files": "vblora.io",
    "vblora.storage.fitting": "vblora.files.match",
    "vblora.storage.inspect": "vblora.files.describe",
    "vblora.storage.layer_names": "vblora.files.layer_names",
    "vblora.storage.lora_format": "vblora.files.lora",
    "vblora.storage.packed": "vblora.files.packed",
    "vblora.storage.packing": "vblora.files.convert",
    "vblora.storage.peft_format": "vblora.files.peft_format",
    "vblora.storage.shared_bank": "vblora.files.shared_bank",
    "vblora.training": "vblora_experiments",
    "vblora.training.exporting": "vblora.models",
    "vblora.training.merging": "vblora.models",
    "vblora.training.sampling": "vblora.sampling",
    "vblora.training.sharding": "vblora.sharding",
    "vblora.training.trainer": "vblora.trainer",
    "vblora.training.tuned": "vblora.models",
}
# Names that an old module had and the module now in its place has not: where they are, as "module:name".
RENAMED = {
    "vblora.storage": {
        "load": "vblora.adapter:load",
        "restore": "vblora.adapter:restore",
        "save": "vblora.adapter:save",
    },
    "vblora.storage.packed": {
        "MOST_FACTOR_BYTES": "vblora.files.content:MOST_FACTOR_BYTES",
        "Packed": "vblora.files.content:Content",
    },
    "vblora.storage.shared_bank": {
        "read_bank": "vblora.files.reading:read_bank",
        "use_bank": "vblora.methods.given_bank:use_bank",
    },
    "vblora.training.records": {"folder_fingerprint": "vblora.io:folder_fingerprint"},
}
EXPERIMENTS = "vblora.training."  # the rest of this package went to vblora_experiments under the same names


def new_name(name: str) -> str | None:
    """Where the module of this old name is now; None where the name is no old one."""
    if name in MOVED:
        return MOVED[name]
    return f"vblora_experiments.{name.removeprefix(EXPERIMENTS)}" if name.startswith(EXPERIMENTS) else None


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if new_name(name) is None else ModuleSpec(name, self, is_package=name in PACKAGES)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        place = new_name(spec.name)
        assert place is not None
        warnings.warn(f"{spec.name} has moved: import {place}", DeprecationWarning, stacklevel=2)
        return _Alias(spec.name, place)

    def exec_module(self, module: ModuleType) -> None:
        pass


PACKAGES = ("vblora.storage", "vblora.training")


class _Alias(ModuleType):
    """A module of an old name whose content is the new one's."""

    def __init__(self, name: str, place: str) -> None:
        super().__init__(name)
        self.__dict__["_module"] = importlib.import_module(place)
        if name in PACKAGES:  # else the new package's folder would be searched, and its modules made a second time
            self.__path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name in RENAMED.get(self.__name__, {}):
            place, _, new = RENAMED[self.__name__][name].partition(":")
            return getattr(importlib.import_module(place), new)
        return getattr(self.__dict__["_module"], name)


def install() -> None:
    """Let Python find modules by their old names, after it has looked everywhere else."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
