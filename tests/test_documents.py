"""What the documents show is what the records give."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import fill_tables  # noqa: E402

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_are_made_from_the_records(path):
    """Each table between the markers of a document is what the command in its marker prints."""
    text = path.read_text(encoding="utf-8")
    assert text.count("<!-- made by: ") == text.count("<!-- end -->") == len(fill_tables.TABLE.findall(text))
    assert fill_tables.filled(text) == text
