"""Everything that needs a GPU, by gpu.sh: stages over the other benchmarks and the tables' campaigns.

    benchmarks/gpu.sh --kit KIT [--only step_time_nf4 e2e] [--records results/gpu] [--minutes 9] [--at_once 8]
    benchmarks/gpu.sh --rehearse [--records DIR]
    benchmarks/gpu.sh --pack KIT [--glue_dir DIR] [--e2e_dir DIR] [--models_dir DIR] [--wheels]

Stages that measure time run alone, those of the tables several at once. At the limit what runs is stopped: the next
call goes on with it, a table's run from its last checkpoint, a measurement from its beginning. A stage that has ended
well is in RECORDS/stages.json, with device, versions and seconds, and is not run again. Output goes to RUNS/NAME.log.
Exit code 0: all is done; 3: the same command goes on; 2: something failed.

--pack makes the folder KIT for a machine without a network: of --glue_dir GLUE's folders (CoLA, MRPC, SST-2), of
--e2e_dir the challenge's CSV files, of --models_dir the folder SmolLM2-135M-Instruct, and the encoder's package, all
weights in 16 bits; with --wheels the packages that gpu.sh lists. Stages whose data are not in the kit are left out.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired
from typing import Any

import gpu_kit
import torch

from vblora.io import read_json, write_json
from vblora_experiments import commands
from vblora_experiments.records import environment

ROOT = Path(__file__).resolve().parents[1]
POLL = 0.2  # seconds
LEAST = 20  # seconds that must be left for a further stage to be started
TABLE_1 = ("full", "lora_qv", "vera_qv", "tied_lora_qv", "lora_xs", "vblora_qv", "vblora_all")
SEEDS = "--seeds 0 1 2 3 4"


@dataclass(frozen=True)
class Stage:
    """One command. In `command` and `small`, {records}, {runs} and {kit} are folders.

    Attributes:
        small: what the rehearsal has in place of `flags`.
        needs: what of the kit must be there.
        alone: nothing else runs meanwhile, as time is measured.
        minutes: less must not be left for it to be started, unless it is a call's first.
    """

    name: str
    command: str
    flags: str
    small: str
    needs: tuple[str, ...] = ()
    alone: bool = True
    minutes: float = 2


def timed(name: str, script: str, flags: str, small: str, **more: Any) -> Stage:
    """A benchmark, which writes its own record."""
    return Stage(name, f"benchmarks/{script}.py --record {{records}}/{name}.json", flags, small, **more)


def table(name: str, command: str, flags: str, small: str, *needs: str) -> Stage:
    """A campaign, whose records are copied as they come."""
    places = f"--runs {{runs}}/{name} --collect {{records}}/{name.split('_')[0]}"
    return Stage(name, f"{command} {places}", flags, small, needs, alone=False, minutes=0)


FEW = "--max_train_samples 16 --num_train_epochs 1"
SMALL_BANK = "--rows 300 --num_vectors 64 --vector_length 32 --rounds 1"
TASKS = {"cola": "CoLA", "mrpc": "MRPC", "sst2": "SST-2"}
STAGES = [
    timed("step_time_bf16", "step_time", "--shapes llama2_7b --rounds 10", "--shapes small --rounds 1", minutes=4),
    timed("step_time_nf4", "step_time", "--shapes llama2_7b_nf4 --rounds 10", "--shapes small_nf4 --rounds 1"),
    timed("composition", "composition", "--rounds 20", SMALL_BANK),
    timed("composition_bf16", "composition", "--rounds 20 --dtype bfloat16", f"{SMALL_BANK} --dtype bfloat16"),
    timed("generation", "generation", "", "--layers 1 --width 64 --batches 1 --rounds 1"),
    timed("many_adapters", "many_adapters", "", "--adapters 2 --rounds 1"),
    table(
        "e2e",
        "NLG/reproduce_e2e.py table2 --sizes smollm2 --data_dir {kit}/data/e2e",
        "--methods lora vblora --seeds 0 1 2 -- --bf16 true",
        f"--methods vblora --seeds 0 -- {FEW} --max_eval_samples 4 --quick_samples 0 --beam 1",
        "data/e2e",
        gpu_kit.cached("HuggingFaceTB/SmolLM2-135M-Instruct"),
    ),
    *(
        table(
            f"table1_{task}_{method}",
            f"NLU/reproduce.py table1 --sizes minilm --glue_dir {{kit}}/data --tasks {task} --methods {method}",
            SEEDS,
            f"--seeds 0 -- {FEW}",
            f"data/{folder}",
        )
        for task, folder in TASKS.items()
        for method in TABLE_1
    ),
    *(
        table(
            f"recipe_{task}_{row}",
            f"NLU/recipe_study.py recipe --glue_dir {{kit}}/data --tasks {task} --rows {row}",
            SEEDS,
            "--seeds 0 --epochs 1",
            f"data/{folder}",
        )
        for task, folder in TASKS.items()
        for row in ("lora", "recipe", "recipe_small")
    ),
]
# One of each kind; the others are the same commands with other names.
REHEARSED = [s.name for s in STAGES if not s.name.startswith(("table1", "recipe"))]
REHEARSED += ["table1_cola_vblora_all", "recipe_cola_recipe"]


@dataclass
class Call:
    """What one call of gpu.sh works with."""

    kit: Path
    records: Path
    runs: Path
    rehearse: bool
    at_once: int
    deadline: float
    environment: dict[str, str]
    running: dict[str, tuple[Stage, Popen[bytes], float]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def done(self) -> dict[str, Any]:
        """The stages that have ended well, and how."""
        file = self.records / "stages.json"
        return {n: s for n, s in (read_json(file) if file.exists() else {}).items() if s["ended"]}

    def note(self, name: str, seconds: float, ended: bool) -> None:
        """Add a call's seconds to a stage's, with where they were spent."""
        file = self.records / "stages.json"
        stages = read_json(file) if file.exists() else {}
        before = stages.get(name, {"seconds": 0.0, "calls": 0})
        spent = {"seconds": round(before["seconds"] + seconds, 1), "calls": before["calls"] + 1}
        write_json(file, {**stages, name: {"ended": ended, "rehearsal": self.rehearse, **spent, **environment()}})


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.pack:
        gpu_kit.pack(options.pack, options.glue_dir, options.e2e_dir, options.models_dir, options.wheels)
        return
    call = begin(options)
    chosen = [stage for stage in STAGES if stage.name in options.only]
    lacking = {s.name: n for s in chosen for n in s.needs if not (call.kit / n).exists()}
    for name, need in lacking.items():
        print(f"{name}: left out, as {call.kit / need} is not there", flush=True)
    waiting = [s for s in chosen if s.name not in lacking and s.name not in call.done]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    try:
        unfinished = work(call, waiting)
    finally:
        stop(call)
        signal.signal(signal.SIGTERM, before)
    if call.failed:
        raise ValueError(f"failed: {', '.join(call.failed)}; see their logs in {call.runs}")
    if unfinished:
        print(f"{len(unfinished)} stages are left: the same command goes on")
        sys.exit(3)
    print(f"all is done: {call.records}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--kit", type=Path, help="what --pack made; without it the stages that need no data")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--records", type=Path, help="results/gpu unless given; in the rehearsal runs/gpu/rehearsal")
    parser.add_argument("--runs", type=Path, help="for checkpoints and logs: runs/gpu unless given")
    parser.add_argument("--minutes", type=float, default=9, help="that a call may take (9)")
    parser.add_argument("--at_once", type=int, help="of the tables' stages: half of the cores unless given")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on what is generated, on the CPU")
    parser.add_argument("--pack", type=Path, metavar="KIT", help="make a kit, and no more")
    for name in ("glue_dir", "e2e_dir", "models_dir"):
        parser.add_argument(f"--{name}", type=Path, help="for --pack")
    parser.add_argument("--wheels", action="store_true", help="for --pack: download the packages too")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        raise ValueError(f"--minutes must be above 0, not {options.minutes:g}")
    if options.at_once is not None and options.at_once < 1:
        raise ValueError(f"--at_once must be at least 1, not {options.at_once}")
    if options.kit is not None and not options.kit.is_dir():
        raise ValueError(f"--kit {options.kit}: no such folder; --pack makes one")
    if options.rehearse and options.kit is not None:
        raise ValueError("--rehearse makes a kit of its own: leave --kit out")
    if not (options.pack or options.rehearse or torch.cuda.is_available()):
        raise ValueError("PyTorch finds no GPU here; --rehearse runs the same on the CPU, tiny")
    options.only = options.only or (REHEARSED if options.rehearse else names)
    return options


def begin(options: argparse.Namespace) -> Call:
    """Make the folders, install the kit's packages, and start the clock."""
    began = time.monotonic()
    runs = options.runs or ROOT / "runs" / "gpu"
    if options.rehearse:
        runs = runs / "rehearsal"
    records = options.records or (runs / "records" if options.rehearse else ROOT / "results" / "gpu")
    for folder in (runs, records):
        folder.mkdir(parents=True, exist_ok=True)
    kit = options.kit or runs / "kit"
    if options.rehearse:
        gpu_kit.generate(kit)
    own = {"HF_HUB_CACHE": str((kit / "hub").resolve()), "HF_HUB_OFFLINE": "1"}
    if options.rehearse:
        own["CUDA_VISIBLE_DEVICES"] = ""
    if site := gpu_kit.install(kit, runs / "site"):
        own["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", str(ROOT))])
    at_once = options.at_once or max(1, (os.cpu_count() or 2) // 2)
    deadline = began + 60 * options.minutes
    return Call(kit, records, runs, options.rehearse, at_once, deadline, {**os.environ, **own})


def work(call: Call, waiting: list[Stage]) -> list[str]:
    """Run stages until all have ended or the time is up; those that have not ended well or badly."""
    began = False
    while waiting or call.running:
        if call.left <= 0:
            break
        room = [s for s in waiting if may_start(s, call, began)]
        if room:
            waiting.remove(room[0])
            start(room[0], call)
            began = True
        elif not call.running:
            break  # what is left takes longer than there is time
        else:
            time.sleep(POLL)
        for name, (_, process, _) in list(call.running.items()):
            if process.poll() is not None:
                end(name, call)
    return [*call.running, *(stage.name for stage in waiting)]


def may_start(stage: Stage, call: Call, began: bool) -> bool:
    alone = stage.alone and not call.rehearse
    if alone or any(s.alone and not call.rehearse for s, _, _ in call.running.values()):
        if call.running:
            return False
    elif len(call.running) >= call.at_once:
        return False
    return not began or call.rehearse or call.left >= max(LEAST, 60 * stage.minutes)


def start(stage: Stage, call: Call) -> None:
    words = f"{stage.command} {stage.small if call.rehearse else stage.flags}".split()
    places = {"records": str(call.records), "runs": str(call.runs), "kit": str(call.kit)}
    command = [sys.executable, *(word.format(**places) for word in words)]
    print(f"{stage.name}: {' '.join(command[1:])}", flush=True)
    with (call.runs / f"{stage.name}.log").open("ab") as log:
        process = Popen(command, cwd=ROOT, stdout=log, stderr=STDOUT, env=call.environment)
    call.running[stage.name] = (stage, process, time.monotonic())


def end(name: str, call: Call) -> None:
    _, process, began = call.running.pop(name)
    seconds, code = time.monotonic() - began, process.returncode
    call.note(name, seconds, code == 0)
    print(f"{name}: {'done' if code == 0 else f'FAILED (exit code {code})'} after {seconds:.0f} s", flush=True)
    if code:
        call.failed.append(name)


def stop(call: Call) -> None:
    """Stop what still runs; what checkpoints it has wrote remain."""
    for _, process, _ in call.running.values():
        process.terminate()
    for name, (_, process, began) in call.running.items():
        try:
            process.wait(timeout=15)
        except TimeoutExpired:
            process.kill()
            process.wait()
        call.note(name, time.monotonic() - began, False)
        print(f"{name}: stopped after {time.monotonic() - began:.0f} s, goes on in the next call", flush=True)


if __name__ == "__main__":
    commands.run(main, "gpu")
