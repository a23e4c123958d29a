"""Recordings as Whisper reads them: one channel at 16 kHz, in float32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

RATE = 16_000  # samples a second, of every Whisper model
KINDS = "WAV, FLAC, OGG and MP3"
STREAMED = 0x7FFF0000  # bytes: from here on a WAV's length is none, its header was written before the sound
# Seconds that a recording may lack: an MP3 without a header is counted in whole frames, and some programs write into a
# WAV's header the size of the file.
SHORTER = 0.1


class Recording(NamedTuple):
    """What a file's header says."""

    seconds: float
    rate: int
    channels: int
    eight_bit: bool


def inspect(path: Path, where: str) -> Recording:
    """A recording's length and form, without decoding it.

    Args:
        path: the file.
        where: the table and line that name it, for errors.

    Raises:
        ValueError: no such file, no sound in it, or a form that cannot be read.
    """
    import soundfile

    if not path.is_file():
        raise ValueError(f"{where}: no recording {path}: put it there, or remove the row")
    try:
        found = soundfile.info(str(path))
    except (RuntimeError, TypeError) as error:  # libsndfile's; and of .raw, which does not say what it holds
        raise ValueError(
            f"{where}: {path} cannot be read ({' '.join(str(error).split())}); {KINDS} can: convert it with "
            "`ffmpeg -i FILE FILE.wav`, or remove the row"
        ) from error
    if not found.frames:
        raise ValueError(f"{where}: {path} has no sound, it is empty or cut short: get it anew, or remove the row")
    seconds = found.frames / found.samplerate
    promised = seconds * _promised_by_wav(path)
    if seconds < promised - SHORTER:
        raise _cut_short(where, path, seconds, promised)
    return Recording(seconds, found.samplerate, found.channels, found.subtype.endswith("8"))


def _cut_short(where: str, path: Path, seconds: float, promised: float) -> ValueError:
    return ValueError(
        f"{where}: {path} is cut short: {seconds:.1f} s of {promised:.1f} s can be read: get it anew, or remove the row"
    )


def _promised_by_wav(path: Path) -> float:
    """How much sound a WAV's header promises, as a share of what is there: libsndfile reads that, and says no word."""
    with path.open("rb") as file:
        if file.read(4) != b"RIFF" or file.read(8)[4:] != b"WAVE":
            return 1.0
        while len(head := file.read(8)) == 8:
            name, size = head[:4], int.from_bytes(head[4:], "little")
            if name == b"data":
                there = path.stat().st_size - file.tell()
                return 1.0 if size >= STREAMED or not there else size / there
            file.seek(size + size % 2, 1)
    return 1.0


def read(path: Path, where: str) -> np.ndarray:
    """The samples of a recording at 16 kHz, shape (samples,); several channels are averaged. Errors as `inspect`."""
    import soundfile

    found = inspect(path, where)
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except RuntimeError as error:
        raise ValueError(f"{where}: {path} is damaged ({' '.join(str(error).split())}): remove the row") from error
    if not len(samples):
        raise ValueError(f"{where}: {path} has no sound that can be read: get it anew, or remove the row")
    if (seconds := len(samples) / rate) < found.seconds - SHORTER:
        raise _cut_short(where, path, seconds, found.seconds)
    if not np.isfinite(samples).all():
        raise ValueError(f"{where}: {path} has samples that are NaN or infinite: mend it, or remove the row")
    return resampled(samples.mean(axis=1) if found.channels > 1 else samples[:, 0], rate)


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples at `rate` as samples at 16 kHz, by a polyphase filter."""
    if rate == RATE:
        return np.ascontiguousarray(samples, dtype=np.float32)
    from scipy.signal import resample_poly

    common = math.gcd(rate, RATE)
    return resample_poly(samples, RATE // common, rate // common).astype(np.float32)
