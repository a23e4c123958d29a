"""Modules of version 0.1 are found under their old names."""

from __future__ import annotations

import importlib
import sys

import pytest

import vblora
from vblora import moved


@pytest.mark.parametrize("old", [*moved.MOVED, "vblora.training.records", "vblora.training.progress"])
def test_an_old_name_gives_what_is_at_the_new_place(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match="has moved: import"):
        module = importlib.import_module(old)
    new = importlib.import_module(moved.new_name(old))
    public = [name for name in vars(new) if not name.startswith("_")]
    assert public or old == "vblora.training"
    assert all(getattr(module, name) is getattr(new, name) for name in public)


@pytest.mark.filterwarnings("ignore:.*has moved")
@pytest.mark.parametrize("old", moved.RENAMED)
def test_names_that_went_elsewhere_are_found_too(old):
    sys.modules.pop(old, None)
    module = importlib.import_module(old)
    for name, new in moved.RENAMED[old].items():
        place, _, attribute = new.partition(":")
        assert getattr(module, name) is getattr(importlib.import_module(place), attribute)


def test_from_an_old_package_come_its_old_modules():
    for old in ("vblora.storage", "vblora.storage.packed"):
        sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning):
        from vblora.storage import packed
    from vblora.files import packed as now

    assert packed.read is now.read


def test_a_name_that_never_was_is_still_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"vblora\.nothing"):
        importlib.import_module("vblora.nothing")
    assert vblora.__version__
