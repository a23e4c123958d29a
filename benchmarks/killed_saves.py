"""What a killed save leaves: processes that save two adapters in turns are killed at random, and the folder is read.

    python benchmarks/killed_saves.py --kills 200

Each directory must load as one of the two adapters, settings and numbers, each packed file too; and after one more save
nothing but the adapter's own files may be there. It prints how often each was found, and ends with code 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import vblora
from vblora.files import packed
from vblora_experiments import bars

ALPHAS = (2.0, 64.0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rng = random.Random(options.seed)
    adapters = [tied(alpha) for alpha in ALPHAS]
    counts = {"first": 0, "second": 0, "interrupted": 0}
    with tempfile.TemporaryDirectory() as place:
        directory, file = Path(place) / "adapter", Path(place) / "adapter.vblora.safetensors"
        save(adapters[0], directory, file)
        for _ in bars.bar(range(options.kills), "kills"):
            kill_one(adapters, directory, file, rng.uniform(0, 0.2))
            left = [name for name in os.listdir(directory) if name.startswith(".")]
            found = state(vblora.load(base(), directory))
            state_of_file = packed.read(file)
            assert state_of_file.config.lora_alpha == float(state_of_file.tensors["scale_u"].flatten()[0])
            counts["first" if found == ALPHAS[0] else "second"] += 1
            counts["interrupted"] += bool(left)
        save(adapters[1], directory, file)
        assert state(vblora.load(base(), directory)) == ALPHAS[1]
        left = sorted(str(path.relative_to(place)) for path in Path(place).rglob("*"))
    print(f"{options.kills} kills: {counts}; nothing mixed, nothing refused; left after one more save: {left}")
    inside = [f"adapter/{name}" for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")]
    return int(left != ["adapter", "adapter.vblora.safetensors", *inside])


def kill_one(adapters: list[vblora.Adapter], directory: Path, file: Path, after: float) -> None:
    """Let a process save the adapters in turns, and kill it `after` so many seconds."""
    child = os.fork()
    if child == 0:
        while True:
            for adapter in adapters:
                save(adapter, directory, file)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def save(adapter: vblora.Adapter, directory: Path, file: Path) -> None:
    adapter.save(directory)
    adapter.pack(file)


def state(adapter: vblora.Adapter) -> float:
    """The value that is in the adapter's settings and in all its numbers."""
    assert all((parameter == adapter.config.lora_alpha).all() for parameter in adapter.parameters())
    return adapter.config.lora_alpha


def tied(alpha: float) -> vblora.Adapter:
    adapter = vblora.attach(base(), vblora.TiedLoRAConfig(r=2, lora_alpha=alpha, target_modules=["0", "1"]), seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(alpha)
    return adapter


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


if __name__ == "__main__":
    raise SystemExit(main())
