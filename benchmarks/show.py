"""Print again what a benchmark printed, from its record: python benchmarks/show.py results/speed/step_time.json"""

from __future__ import annotations

from pathlib import Path

from vblora.io import read_json
from vblora_experiments import commands


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise ValueError("usage: show.py RECORD")
    found = read_json(Path(arguments[0]))
    if "printed" not in found:
        raise ValueError(f"{arguments[0]} is no record of a benchmark with what it printed")
    print("\n".join(found["printed"]))


if __name__ == "__main__":
    commands.run(main, "show")
