"""What is made of two texts before their words are compared.

raw       white space alone
unicode   compatibility forms, lower case, no punctuation; letters with all their marks; l'eau is one word
basic     Whisper's for all languages: drops every mark, so that Hindi loses its vowel signs, and splits l'eau
english   Whisper's for English: spelled numbers, contractions and British spellings too; wrong for other languages
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import regex

from vblora.io import read_json

NAMES = ("raw", "unicode", "basic", "english")
APOSTROPHES = dict.fromkeys(map(ord, "’ʼ‘＇`´"), "'")
SPELLINGS = "normalizer.json"  # in the folder of every Whisper on the hub

Normaliser = Callable[[str], str]


def normaliser(name: str, spellings: Path | None = None) -> Normaliser:
    """The function of this name.

    Args:
        name: one of `NAMES`.
        spellings: for "english", the file with British words and the American ones, or the folder that holds it.

    Raises:
        ValueError: an unknown name, or "english" without its spellings.
    """
    if name == "raw":
        return raw
    if name == "unicode":
        return unicode_safe
    if name not in NAMES:
        raise ValueError(f"unknown normaliser {name!r}; known: {', '.join(NAMES)}")
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if name == "basic":
        return _stripped(BasicTextNormalizer())
    file = spellings / SPELLINGS if spellings is not None and spellings.is_dir() else spellings
    if file is None or not file.is_file():
        raise ValueError(
            f"the english normaliser needs {SPELLINGS}, which every Whisper on the hub has: name it with --spellings"
        )
    return _stripped(EnglishTextNormalizer(read_json(file)))


def _stripped(normalise: Normaliser) -> Normaliser:
    """Without the blanks that Whisper's own leave where a text ends with punctuation, which no rate is to count."""
    return lambda text: raw(normalise(text))


def raw(text: str) -> str:
    """The text, with single blanks."""
    return " ".join(text.split())


def unicode_safe(text: str) -> str:
    """Lower-case words without punctuation: NFKC; letters, marks and numbers stay, an apostrophe within a word too."""
    text = unicodedata.normalize("NFKC", text.translate(APOSTROPHES)).translate(APOSTROPHES)
    text = regex.sub(r"\p{Cf}", "", text.lower())  # joiners and soft hyphens stand within words
    text = regex.sub(r"[^\p{L}\p{M}\p{N}']", " ", text)
    text = regex.sub(r"(?<![\p{L}\p{M}\p{N}])'|'(?![\p{L}\p{M}\p{N}])", " ", text)
    return " ".join(unicodedata.normalize("NFC", text).split())
