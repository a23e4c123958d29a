"""All benchmarks by one command, each in a process of its own, with what each prints.

    python benchmarks/all.py [--small] [--only step_time loading] [--records results/speed]

Those that need data or a model beside the checkout run without, on what they generate. --small is the least that runs
all of each, for a test (padding.py is left out then): its figures say nothing. --records DIR writes DIR/NAME.json of
each. Ends with an error that names those that failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from vblora_experiments import bars, commands

FOLDER = Path(__file__).resolve().parent
ONE_LAYER = "--layers 1 --width 64"
SMALL: dict[str, str | None] = {  # the benchmarks in the order they run, each with its small setting if it has one
    "step_time": "--shapes small small_nf4 --rounds 1",
    "exchange": f"{ONE_LAYER} --num_vectors 64 --vector_length 32 --steps 2",
    "composition": "--rows 300 --num_vectors 64 --vector_length 32 --rounds 1",
    "generation": f"{ONE_LAYER} --batches 1 --rounds 1",
    "loading": f"{ONE_LAYER} --rounds 1",
    "active_logits": "--steps 2 --num_vectors 64 --stds 0.01",
    "scaling": "",
    "training_memory": "",
    "learning": "--steps 1",
    "narrow": "--widths 8 --seeds 0",
    "growth": "--axes h --points 2 --rounds 1",
    "pipeline": "--small",
    "padding": None,  # its batches are of 512 tokens, at least two
    "many_adapters": "--adapters 2 --rounds 1",
    "packed": "",
    "file_sizes": "",
    "scheduling": "--runs 2 --rounds 1",
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the least that runs all of each")
    parser.add_argument("--only", nargs="+", choices=list(SMALL), default=list(SMALL), metavar="NAME")
    parser.add_argument("--records", type=Path, metavar="DIR", help="write DIR/NAME.json of each")
    options = parser.parse_args(arguments)
    if options.records is not None and options.records.exists() and not options.records.is_dir():
        raise ValueError(f"--records {options.records} is no folder")
    failed = []
    for name in bars.bar(options.only, "benchmarks"):
        small = SMALL[name] if options.small else ""
        if small is None:
            print(f"\n{name} is left out: it has no small setting", flush=True)
        elif not succeeds(name, small.split(), options.records):
            failed.append(name)
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; see above")


def succeeds(name: str, flags: list[str], records: Path | None) -> bool:
    """Run one benchmark, and whether it ended well."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *flags]
    command += ["--record", str(records / f"{name}.json")] if records is not None else []
    print(f"\n{name}\n{'-' * len(name)}\n", flush=True)
    began = time.perf_counter()
    code = subprocess.run(command).returncode
    ended = f"in {time.perf_counter() - began:.0f} s" if code == 0 else f"with exit code {code}"
    print(f"\n{name} ended {ended}", flush=True)
    return code == 0


if __name__ == "__main__":
    commands.run(main, "all")
