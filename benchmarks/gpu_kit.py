"""What gpu.sh takes to a machine without a network: data, weights in 16 bits, packages; and the rehearsal's, generated.

Weights lie as in the hub's own cache (KIT/hub), so that a model is found there by its name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "NLG"), str(ROOT / "NLU")]  # first: NLG has a generation.py too
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
GLUE = ("CoLA", "MRPC", "SST-2")
LINUX = [f"--platform=manylinux{kind}_x86_64" for kind in ("2014", "_2_17", "_2_24", "_2_27", "_2_28")]
COMMIT = "16bits"  # what a snapshot in the cache is called


def cached(name: str) -> str:
    """Where a model of the hub is in a kit."""
    return f"hub/models--{name.replace('/', '--')}"


def pack(kit: Path, glue_dir: Path | None, e2e_dir: Path | None, models_dir: Path | None, wheels: bool = False) -> None:
    """Make, or complete, a kit, and say what is in it.

    Raises:
        ValueError: a folder is not there, or holds nothing of use.
    """
    for place in (glue_dir, e2e_dir, models_dir):
        if place is not None and not place.is_dir():
            raise ValueError(f"{place}: no such folder")
    sources = {f"data/{name}": glue_dir / name for name in GLUE if glue_dir and (glue_dir / name).is_dir()}
    if glue_dir and not sources:
        raise ValueError(f"--glue_dir {glue_dir} has none of the folders {', '.join(GLUE)}")
    sources |= {"data/e2e": e2e_dir} if e2e_dir else {}
    for place, source in sources.items():
        shutil.copytree(source, kit / place, dirs_exist_ok=True)
    for name, folder in models(models_dir).items():
        in_16_bits(folder, kit, name)
    if wheels:
        download(kit / "wheels", os.environ.get("VBLORA_WHEELS", "").split())
    for path in sorted(kit.glob("*/*")):
        size = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
        print(f"{path.relative_to(kit)}: {size / 2**20:.1f} MiB")


def models(models_dir: Path | None) -> dict[str, Path]:
    """The folders of the models by their names on the hub."""
    from encoders import find_encoder

    if models_dir is None:
        return {MINILM: find_encoder()}
    folder = models_dir / SMOLLM2.rpartition("/")[2]
    if not folder.is_dir():
        raise ValueError(f"--models_dir {models_dir} has no folder {folder.name}")
    return {MINILM: find_encoder(), SMOLLM2: folder}


def in_16_bits(folder: Path, kit: Path, name: str) -> None:
    """A copy of a model's folder with its weights in bfloat16; it is still loaded in the precision that it had.

    Raises:
        ValueError: no weights as safetensors.
    """
    from safetensors.torch import load_file, save_file

    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} has no *.safetensors")
    snapshot = kit / cached(name) / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (kit / cached(name) / "refs").mkdir(exist_ok=True)
    (kit / cached(name) / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    for file in folder.iterdir():
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copyfile(file, snapshot / file.name)
    kinds = set()
    for file in weights:
        tensors = load_file(file)
        kinds |= {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        halved = {key: t.to(torch.bfloat16) if t.is_floating_point() else t for key, t in tensors.items()}
        save_file(halved, snapshot / file.name, {"format": "pt"})
    config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32" if torch.float32 in kinds else "bfloat16"
    (snapshot / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def download(folder: Path, wanted: list[str], python: str = "3.12") -> None:
    """The packages for Linux on x86-64; those that have no wheel are built here.

    Raises:
        ValueError: one cannot be had.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    for package in wanted:
        foreign = [f"--python-version={python}", "--implementation=cp", "--only-binary=:all:", *LINUX]
        there = subprocess.run([*pip, "download", "-q", "--no-deps", *foreign, "-d", str(folder), package])
        if (
            there.returncode
            and subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(folder), package]).returncode
        ):
            raise ValueError(f"{package} cannot be downloaded; pip says why above")


def install(kit: Path, site: Path) -> Path | None:
    """Install the kit's packages into a folder of their own, once; the folder, if there are any.

    Raises:
        ValueError: pip fails.
    """
    wheels = sorted((kit / "wheels").glob("*.whl"))
    if not wheels:
        return None
    if not site.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target"]
        partly = site.with_name(f"{site.name}.part")
        shutil.rmtree(partly, ignore_errors=True)
        if subprocess.run([*command, str(partly), *map(str, wheels)]).returncode:
            raise ValueError(f"the packages in {kit / 'wheels'} cannot be installed; pip says why above")
        partly.rename(site)
    return site


def generate(kit: Path) -> None:
    """The rehearsal's kit: sentences, restaurants, and a tiny causal model under the name of the one it stands for."""
    if (kit / cached(SMOLLM2)).exists():
        return
    import pipeline

    import generate_cola
    import generate_e2e

    generate_cola.write(kit / "data" / "CoLA", 32, 20, 0)
    generate_e2e.write(kit / "data" / "e2e", 32, 4, 4, 0)
    in_16_bits(pipeline.write_causal(kit / "tiny", kit / "data" / "e2e", True), kit, SMOLLM2)
