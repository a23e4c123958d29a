"""Puts ASR/ on the path, as `python ASR/transcribe.py` does; a set of tones, and tiny Whispers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ASR"))

from speech_helpers import ENGLISH_ONLY, MULTILINGUAL, TEXTS, save_whisper, write_table  # noqa: E402

OF_TRAINING = ("num_train_epochs", "per_device_train_batch_size", "learning_rate")


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """A folder with the three tables."""
    folder = tmp_path_factory.mktemp("tones")
    for split, texts in TEXTS.items():
        write_table(folder, split, texts)
    return folder


@pytest.fixture(scope="session")
def whispers(tmp_path_factory):
    """The folders of a multilingual and of an English-only Whisper."""
    places = tmp_path_factory.mktemp("whispers")
    return {
        "multilingual": save_whisper(places / "multilingual", MULTILINGUAL),
        "english": save_whisper(places / "english", ENGLISH_ONLY),
    }


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def flags(whispers, tones, cache, tmp_path):
    """The flags of a small training."""

    def make(kind="multilingual", *more, out=None):
        flags = {
            "model_name_or_path": whispers[kind],
            "data_dir": tones,
            "language": "it",
            "cache_dir": cache,
            "window": 1,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "disable_tqdm": True,
            "output_dir": out or tmp_path / "run",
        }
        if "zero_shot" in more:  # which takes nothing of training
            flags = {name: value for name, value in flags.items() if name not in OF_TRAINING}
        return [*(word for name, value in flags.items() for word in (f"--{name}", str(value))), *more]

    return make
