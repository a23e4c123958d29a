"""Real speech that Debian holds: the telephone prompts of asterisk-core-sounds, fetched and divided into three parts.

    python ASR/asterisk_prompts.py it DIR              # Italian; en, es, fr and ru are the others
    python ASR/asterisk_prompts.py it DIR --root ROOT  # from packages that `dpkg-deb -x` unpacked into ROOT

One speaker a language, 14 to 19 minutes, under CC-BY or CC-BY-SA (the packages' copyright files name the speakers);
nothing of them is part of this project. Needs apt-get and dpkg-deb unless --root is given.

DIR receives train.tsv, dev.tsv and test.tsv with the columns path and text, and the recordings. Left out: sounds that
are no speech, transcripts with digits (which are spoken as words), lost characters, no recording. Many prompts
differ in a word or two: transcripts that are alike form a cluster, and no cluster lies in two parts.
"""

from __future__ import annotations

import argparse
import gzip
import random
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from rapidfuzz import fuzz

import audio
from normalisers import unicode_safe
from speech_data import SPLITS, unusable
from vblora.io import new_directory
from vblora_experiments import commands

VOICES = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
LONGEST = 30.0  # seconds
ALIKE = 80  # similarity in percent from which two transcripts must lie in the same part
SHARES = {"test": 0.125, "dev": 0.0625}  # of the clips; the rest is for training


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language", choices=VOICES)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--root", type=Path, help="where both packages have been unpacked; they are fetched otherwise")
    chosen = parser.parse_args(arguments)
    if chosen.root is not None:
        write(chosen.root, chosen.language, chosen.folder)
        return
    with tempfile.TemporaryDirectory() as root:
        fetch(chosen.language, Path(root))
        write(Path(root), chosen.language, chosen.folder)


def fetch(language: str, root: Path) -> None:
    """Fetch the two packages of a language and unpack them.

    Raises:
        ValueError: apt-get or dpkg-deb is missing or fails.
    """
    name = f"asterisk-core-sounds-{language}"
    try:
        subprocess.run(["apt-get", "download", name, f"{name}-wav"], cwd=root, check=True, capture_output=True)
        for package in root.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"{name} cannot be fetched with apt-get ({error}): unpack it and {name}-wav elsewhere, and give --root"
        ) from error


def write(root: Path, language: str, folder: Path) -> None:
    """Write the tables and copy the recordings.

    Raises:
        ValueError: `root` does not hold the packages, or the folder exists.
    """
    sounds = root / "usr/share/asterisk/sounds" / VOICES[language]
    texts, refused = usable_prompts(root, language, sounds)
    parts = divided(texts)
    with new_directory(folder) as new:
        for part in SPLITS:
            for name in parts[part]:
                target = new / "sounds" / f"{name}.wav"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(sounds / f"{name}.wav", target)
            rows = "".join(f"sounds/{name}.wav\t{texts[name]}\n" for name in parts[part])
            (new / f"{part}.tsv").write_text(f"path\ttext\n{rows}", encoding="utf-8")
        for copyright_file in root.glob(f"usr/share/doc/asterisk-core-sounds-{language}*/copyright"):
            shutil.copyfile(copyright_file, new / "copyright")
    counts = ", ".join(f"{part} {len(parts[part])}" for part in SPLITS)
    print(f"{folder}: {counts}; left out: {', '.join(f'{n} ({why})' for why, n in refused.items()) or 'none'}")


def usable_prompts(root: Path, language: str, sounds: Path) -> tuple[dict[str, str], Counter[str]]:
    """The transcripts that can be scored, by their recordings' names, and how many were left out for what."""
    packed = root / f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
    if not packed.is_file() or not sounds.is_dir():
        raise ValueError(
            f"{root} has no {packed.relative_to(root)}, or no {sounds.relative_to(root)}: unpack both there"
        )
    texts: dict[str, str] = {}
    refused: Counter[str] = Counter()
    for line in gzip.decompress(packed.read_bytes()).decode("utf-8-sig").splitlines():
        found = re.match(r"([\w/.-]+):\s*(.*)$", line)
        if found is None:
            continue
        name, text = found[1], " ".join(found[2].split())
        if why := _why_not(name, text, sounds / f"{name}.wav"):
            refused[why] += 1
        else:
            texts[name] = text
    return texts, refused


def _why_not(name: str, text: str, recording: Path) -> str:
    """Why a prompt is no speech with its transcript; "" if it is."""
    if not recording.is_file():
        return "no recording"
    if name.startswith("silence/") or not re.search(r"\w", text) or re.search(r"[\[\](){}<>]", text):
        return "no speech"
    if re.search(r"\d", text):
        return "digits"
    # A mark within a text stands for a letter with an accent: "sar? " for "sarà ".
    if unusable(text) or re.search(r"\?(?=\s*\w)| \? ", text):
        return "a lost character"
    return "too long" if audio.inspect(recording, str(recording)).seconds > LONGEST else ""


def divided(texts: dict[str, str], seed: int = 0) -> dict[str, list[str]]:
    """The names by part: whole clusters of like texts, drawn by the seed, until a part has its share."""
    groups = clusters({name: unicode_safe(text) for name, text in texts.items()})
    random.Random(seed).shuffle(groups)
    parts: dict[str, list[str]] = {part: [] for part in SPLITS}
    for group in groups:
        wanting = [part for part, share in SHARES.items() if len(parts[part]) + len(group) <= share * len(texts)]
        parts[wanting[0] if wanting else "train"] += group
    return {part: sorted(names) for part, names in parts.items()}


def clusters(texts: dict[str, str]) -> list[list[str]]:
    """The names in groups that no likeness crosses: a chain of texts alike in pairs is one group."""
    names = sorted(texts)
    head = {name: name for name in names}

    def root_of(name: str) -> str:
        while head[name] != name:
            name = head[name]
        return name

    for n, one in enumerate(names):
        for other in names[:n]:
            if alike(texts[one], texts[other]):
                head[root_of(one)] = root_of(other)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(root_of(name), []).append(name)
    return list(groups.values())


def alike(one: str, other: str) -> bool:
    """Whether two texts are nearly the same."""
    return fuzz.ratio(one, other) >= ALIKE


if __name__ == "__main__":
    commands.run(main, "asterisk_prompts")
