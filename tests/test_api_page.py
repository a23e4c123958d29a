"""docs/api.md against the package."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import vblora

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"


def test_it_names_every_public_name_with_its_signature():
    written = re.findall(r"^## (\w+)\n\n```text\n(.*)\n```\n\n\S", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(written) == {name: f"{name}{inspect.signature(getattr(vblora, name))}" for name in vblora.__all__}
    assert len(written) == len(vblora.__all__)
