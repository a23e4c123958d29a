"""Whisper's features of recordings, and what its encoder makes of them: computed once, kept in files.

A recording is padded with silence to the window (30 seconds unless it is declared shorter) and becomes log-mel values,
shape (mels, 100 frames a second). The frames after a recording's end are all alike: one of them is kept.

A file's name is a fingerprint of all that decides what it holds, recordings included, so that no file is ever wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import audio
from speech_data import Clip
from vblora.io import new_directory, read_json, write_json
from vblora_experiments import bars
from vblora_experiments.progress import alone

FRAMES = 100  # a second
POSITIONS = 50  # a second, after the encoder's second convolution
VERSION = 1  # of the files
BATCH = 8  # recordings that the encoder reads at once

# SpecAugment (Park et al., 2019): masks of each kind, and how much one may cover.
TIME_MASKS, TIME_SHARE = 2, 0.1
MEL_MASKS, MEL_SHARE = 2, 0.3


class Features(NamedTuple):
    """The log-mel values of recordings, in one file.

    Attributes:
        values: of all recordings in a row, float32.
        starts: where each begins, and where the last ends.
        mels: rows of each.
        frames: columns of each, once the last one is repeated.
        key: the fingerprint.
    """

    values: np.ndarray
    starts: list[int]
    mels: int
    frames: int
    key: str

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, number: int) -> Tensor:
        """One recording's, shape (mels, frames); a copy."""
        kept = np.array(self.values[self.starts[number] : self.starts[number + 1]]).reshape(self.mels, -1)
        rest = np.repeat(kept[:, -1:], self.frames - kept.shape[1], axis=1)
        return torch.from_numpy(np.concatenate([kept, rest], axis=1))

    def own_frames(self, number: int) -> int:
        """The frames of a recording itself, without what it is padded with."""
        return (self.starts[number + 1] - self.starts[number]) // self.mels


def features_of(
    clips: Sequence[Clip], sounds: Sequence[str], seconds: Sequence[float], mels: int, window: int, cache: Path
) -> Features:
    """The features of these recordings, from the cache if they are there.

    Args:
        clips: with the recordings' files.
        sounds: each file's SHA-256.
        seconds: each recording's length, from which the size is told beforehand.
        mels: of the model: 80, or 128 from large-v3 on.
        window: in seconds.
        cache: the folder.
    """
    key = _key({"what": "log-mel", "mels": mels, "window": window, "sounds": list(sounds)})
    folder = cache / f"features_{key}"

    def make(new: Path) -> None:
        size = sum(min(s * FRAMES + 3, window * FRAMES) for s in seconds) * mels * 4
        print(f"features of {len(clips)} recordings: about {size / 1e6:.1f} MB in {folder}", flush=True)
        compute = log_mel(mels, window)
        read = (audio.read(clip.path, clip.where) for clip in bars.bar(clips, "features"))
        starts = _write(new / "values.f32", (_cut(compute(samples)) for samples in read))
        write_json(new / "index.json", {"starts": starts})

    _fill(folder, make)
    with _reading(folder):
        starts = read_json(folder / "index.json")["starts"]
        values = np.memmap(folder / "values.f32", np.float32, mode="r")
        if len(starts) != len(clips) + 1 or len(values) != starts[-1]:
            raise ValueError(f"{len(values)} numbers")
    return Features(values, starts, mels, window * FRAMES, key)


def _fill(folder: Path, make: Callable[[Path], None]) -> None:
    """Have `make` fill a folder of the cache where it is missing: one process does, and others wait for it."""
    if folder.is_dir():
        return
    with alone(folder, wait=True):
        if not folder.is_dir():  # else another process has made it meanwhile
            with new_directory(folder) as new:
                make(new)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Within it a folder of the cache is read; what is wrong with it names the folder.

    Raises:
        ValueError: in the place of all that reading may raise.
    """
    try:
        yield
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} is damaged ({error}): remove it, and it is made anew") from error


def log_mel(mels: int, window: int) -> Callable[[np.ndarray], np.ndarray]:
    """The function from samples at 16 kHz to log-mel values, shape (mels, 100 * window), as Whisper was trained on."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=window)

    def compute(samples: np.ndarray) -> np.ndarray:
        found = extractor(samples, sampling_rate=audio.RATE, return_tensors="np")["input_features"][0]
        return np.asarray(found, np.float32)

    return compute


def _cut(values: np.ndarray) -> np.ndarray:
    """The columns up to the first of those at the end that are all alike, that one included."""
    changes = np.flatnonzero((values[:, 1:] != values[:, :-1]).any(axis=0))
    return values[:, : (changes[-1] + 2 if len(changes) else 1)]


def _write(path: Path, arrays: Iterable[np.ndarray]) -> list[int]:
    starts = [0]
    with path.open("wb") as file:
        for array in arrays:
            file.write(np.ascontiguousarray(array).tobytes())
            starts.append(starts[-1] + array.size)
    return starts


def spec_augment(values: Tensor, own_frames: Sequence[int]) -> Tensor:
    """A copy of features, shape (batch, mels, frames), with bands of time and of frequency set to each one's mean.

    Draws from PyTorch's generator, which a resumed training restores. Of the time only a recording's own is masked.
    """
    values = values.clone()
    mels = values.shape[1]
    for one, length in zip(values, own_frames, strict=True):
        mean = one[:, :length].mean()
        for _ in range(TIME_MASKS):
            start, end = _band(length, TIME_SHARE)
            one[:, start:end] = mean
        for _ in range(MEL_MASKS):
            start, end = _band(mels, MEL_SHARE)
            one[start:end] = mean
    return values


def _band(size: int, share: float) -> tuple[int, int]:
    """A band that covers up to this share, anywhere."""
    width = int(torch.randint(int(size * share) + 1, ()))
    start = int(torch.randint(size - width + 1, ()))
    return start, start + width


# --- What the encoder makes of them -------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """The encoder's outputs of recordings, shape (recordings, positions, width), in one file."""

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def of(self, number: int) -> Tensor:
        """One recording's, shape (positions, width); a copy."""
        return torch.from_numpy(np.array(self.values[number]))


@torch.no_grad()
def encoded_of(features: Features, model: Any, model_print: str, cache: Path) -> Encoded:
    """The encoder's outputs, from the cache if they are there; for an encoder that nothing is trained of.

    Args:
        features: of the recordings.
        model: the Whisper, whose window is that of the features.
        model_print: what decides its weights: a fingerprint, or a name on the hub.
        cache: the folder.
    """
    encoder = model.get_encoder()
    kind = str(encoder.dtype).removeprefix("torch.")
    key = _key({"what": "encoder", "features": features.key, "model": model_print, "dtype": kind})
    shape = (len(features), features.frames * POSITIONS // FRAMES, model.config.d_model)
    stored = np.float16 if kind == "float16" else np.float32  # NumPy has no bfloat16
    folder = cache / f"encoded_{key}"

    def make(new: Path) -> None:
        size = int(np.prod(shape)) * np.dtype(stored).itemsize
        print(f"the encoder's outputs of {shape[0]} recordings: {size / 1e6:.0f} MB in {folder}", flush=True)
        training = encoder.training
        encoder.eval()
        values = np.lib.format.open_memmap(new / "values.npy", "w+", stored, shape)
        for start in bars.bar(range(0, shape[0], BATCH), "the encoder's outputs"):
            batch = torch.stack([features.of(n) for n in range(start, min(start + BATCH, shape[0]))])
            output = encoder(batch.to(encoder.device, encoder.dtype)).last_hidden_state
            values[start : start + len(batch)] = output.to("cpu", torch.float32).numpy()
        values.flush()
        del values
        encoder.train(training)

    _fill(folder, make)
    with _reading(folder):
        kept = np.load(folder / "values.npy", mmap_mode="r")
        if kept.shape != shape:
            raise ValueError(f"the shape is {kept.shape}")
    return Encoded(kept)


def _key(settings: dict[str, Any]) -> str:
    text = json.dumps({**settings, "version": VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
