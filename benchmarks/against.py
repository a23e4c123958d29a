"""This checkout against another one, in turns: python benchmarks/against.py OTHER [--record FILE]

OTHER is a folder with another version of the project, for example an earlier commit:

    git worktree add /tmp/before cc9005a && python benchmarks/against.py /tmp/before

Two processes do the same work, one with each version, and take turns. The work is that of a Llama (256 wide, eight
layers) with VB-LoRA r 4 on all linear layers. A figure is the median over the rounds of this version's seconds divided
by the other's: below 1 this version is faster. The seconds are the processor's for the process, which other work on the
machine disturbs least; waiting for a disk is not in them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WORK = ("training step", "evaluation", "merge and unmerge", "save", "load")
REPEATS = {"training step": 4, "evaluation": 8, "save": 4, "load": 4}  # so that each turn takes a tenth of a second


def worker() -> None:
    """Do the work that standard input names, line by line, and answer each with the processor's seconds."""
    import tempfile
    import time

    with tempfile.TemporaryDirectory() as folder:
        work = prepared(Path(folder))
        for line in sys.stdin:
            name = line.strip()
            began = time.process_time()
            for _ in range(REPEATS.get(name, 1)):
                work[name]()
            print(time.process_time() - began, flush=True)


def prepared(folder: Path) -> dict[str, Callable[[], Any]]:
    """Each piece of work by its name, by the version of the project that is imported here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import vblora

    def base() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=8)
        )

    model, other = base(), base()
    config = vblora.VBLoRAConfig(r=4, num_vectors=256, vector_length=64, topk=2, target_modules="all-linear")
    torch.manual_seed(0)
    adapter = vblora.attach(model, config)
    groups = vblora.param_groups(model, lr=1e-3, lr_vector_bank=1e-3, lr_logits=1e-2)
    optimizer = vblora.AdamW(groups)
    tokens = torch.randint(1000, (4, 32), generator=torch.Generator().manual_seed(0))

    def train() -> None:
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()(input_ids=tokens)

    def merge() -> None:
        adapter.merge()
        adapter.unmerge()

    directory = folder / "adapter"
    train()
    adapter.save(directory)
    return {
        "training step": train,
        "evaluation": evaluate,
        "merge and unmerge": merge,
        "save": lambda: adapter.save(directory),
        "load": lambda: vblora.load(other, directory).detach(),
    }


@contextlib.contextmanager
def version(checkout: Path) -> Iterator[Callable[[str], float]]:
    """A process that works with the version in `checkout`: give it a piece of work, get the seconds."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    process = subprocess.Popen(
        [sys.executable, __file__, "--worker"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    sent, answers = process.stdin, process.stdout

    def seconds(work: str) -> float:
        sent.write(f"{work}\n")
        sent.flush()
        answer = answers.readline()
        if not answer:
            raise ValueError(f"the version in {checkout} ended at: {work}")
        return float(answer)

    try:
        yield seconds
    finally:
        sent.close()
        process.wait()


def main(arguments: list[str]) -> None:
    import turns

    options = turns.parser(__doc__, rounds=15)
    options.add_argument("other", type=Path, help="folder with the other version")
    options.add_argument("--only", nargs="+", choices=WORK, default=WORK, help="of the work, these pieces")
    chosen = options.parse_args(arguments)
    turns.require_positive(chosen, "rounds")
    here = Path(__file__).resolve().parents[1]
    if not (chosen.other / "vblora" / "__init__.py").exists():
        raise ValueError(f"{chosen.other} holds no vblora/: give the folder of a checkout")
    found = {}
    with version(here) as ours, version(chosen.other.resolve()) as theirs:
        for work in chosen.only:

            def way(run: Callable[[str], float], work: str = work) -> Callable[[], float]:
                return lambda: run(work)

            taken = turns.take_turns({"other": way(theirs), "here": way(ours)}, chosen.rounds, warm_up=2)
            found[work] = {"ratio": turns.ratios(taken, "other")["here"], "seconds": turns.medians(taken)}
    lines = [f"{work:<18} {one['ratio']:.3f} of the other's seconds" for work, one in found.items()]
    turns.report("against", {"work": found}, "\n".join(lines), chosen.record)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        worker()
    else:
        from vblora_experiments import commands

        commands.run(main, "against")
