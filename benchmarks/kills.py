"""Kills a run at its file events and starts it again: is its record that of a run that was not?

    python benchmarks/kills.py [--kills 200] [--script glue|e2e|instruct] [--save_steps 3]

A tiny model is trained for three epochs with --save_strategy steps. Every opening for writing, renaming, removal and
new folder in the run's folder is an event. Spread evenly over all of them, a run is killed (SIGKILL) just before one,
and the same command is given again. What is compared is the whole record, or training.json, but for times, memory, date
and machine, and the tensors of last/ and best/. Exits with 1 if any differs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("NLU", "NLG", "instruction_tuning"))]

from vblora.io import read_json, read_tensors  # noqa: E402
from vblora_experiments import bars, commands  # noqa: E402

# What two runs of one plan may differ in.
MEASURED = {"train_seconds", "examples_per_second", "peak_memory_mib", "date", "device", "commit"}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def main(arguments: list[str]) -> int:
    parser = commands.one_line_errors(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--script", choices=SCRIPTS, default="glue")
    parser.add_argument("--save_steps", type=int, default=3)
    options = parser.parse_args(arguments)
    commands.check_least(options, kills=1, save_steps=1)
    torch.set_num_threads(1)  # threads do not outlive a fork
    with tempfile.TemporaryDirectory() as folder:
        script, command = SCRIPTS[options.script](Path(folder))
        command += ["--save_strategy", "steps", "--save_steps", str(options.save_steps)]
        wrong, events = sweep(script, command, Path(folder), options.kills)
    kills = min(options.kills, events)
    print(f"{options.script}: {kills} kills over {events} file events, {kills - len(wrong)} records as uninterrupted")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


def sweep(script: Callable[[list[str]], Any], command: list[str], folder: Path, kills: int) -> tuple[list[str], int]:
    """What went otherwise after a kill, a line each, and the number of file events that a run has."""
    whole = folder / "whole"
    code, events = forked(script, [*command, "--output_dir", str(whole)], whole, 0)
    if code:
        raise ValueError("the uninterrupted run fails")
    expected, wrong = result_of(whole), []
    for at in bars.bar(sorted({1 + number * events // kills for number in range(kills)}), "kills"):
        out = folder / f"killed{at}"
        told = [*command, "--output_dir", str(out)]
        first, _ = forked(script, told, out, at)
        second, _ = forked(script, told, out, 0)
        if first != -signal.SIGKILL or second or result_of(out) != expected:
            found = "no result" if second else ", ".join(differing(expected, result_of(out))) or "the same"
            wrong.append(f"killed at event {at} of {events}: exit codes {first} and {second}; other: {found}")
    return wrong, events


def forked(script: Callable[[list[str]], Any], command: list[str], out: Path, kill_at: int) -> tuple[int, int]:
    """The exit code of a run in a process of its own, killed before that file event if any; and the events it had."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        # A fork renews the pool at its first use, which must not be by two threads at once.
        torch.set_num_threads(1)
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            counted = watch(out, kill_at)
            script(command)
            os.write(writer, str(counted[0]).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader) as events:
        return code, int(events.read() or 0)


def watch(out: Path, kill_at: int) -> list[int]:
    """Count this process's file events in a folder, and kill it before that one; the count, as it grows."""
    counted, place = [0], str(out)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (event in CHANGES or writes) and values and str(values[0]).startswith(place):
            counted[0] += 1
            if counted[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counted


def result_of(out: Path) -> dict[str, Any]:
    """The record of a run (or what its training wrote) without what was measured, and its tensors."""
    file = next(file for name in ("record.json", "training.json") if (file := out / name).exists())
    record = {name: value for name, value in read_json(file).items() if name not in MEASURED}
    files = [path for folder in ("last", "best") for path in sorted((out / folder).glob("*.safetensors"))]
    tensors = {str(path.relative_to(out)): read_tensors(path)[0] for path in files}
    return {**record, **{f"{file} {name}": t.tolist() for file, found in tensors.items() for name, t in found.items()}}


def differing(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))


# ------------------------------------------------------------------------------------- the runs

SMALL = ["--method", "vblora", "--num_vectors", "8", "--vector_length", "16", "--num_train_epochs", "3"]
SMALL += ["--per_device_train_batch_size", "8", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]


def glue(folder: Path) -> tuple[Callable[[list[str]], Any], list[str]]:
    """NLU/run_glue.py: 8 steps an epoch."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    import generate_cola
    import run_glue

    data = folder / "data"
    generate_cola.write(str(data), 64, 40, 0)
    words = sorted({word for path in data.glob("*.tsv") for word in path.read_text().lower().split()})
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(names), **sizes))
    model.bert.save_pretrained(folder / "model")
    BertTokenizerFast(vocab={word: at for at, word in enumerate(names)}).save_pretrained(folder / "model")
    places = ["--task", "cola", "--model_name_or_path", str(folder / "model"), "--data_dir", str(data)]
    return run_glue.main, [*places, *SMALL, "--learning_rate", "1e-2", "--max_length", "32"]


def causal_model(folder: Path) -> Path:
    """A tiny Llama that reads bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), eos_token_id=0, **sizes)).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=letters[0]).save_pretrained(folder / "model")
    return folder / "model"


def e2e(folder: Path) -> tuple[Callable[[list[str]], Any], list[str]]:
    """NLG/train.py, with a validation loss before the training too."""
    import generate_e2e
    import train

    generate_e2e.write(folder / "data", 12, 3, 3, seed=0)
    places = ["--model_name_or_path", str(causal_model(folder)), "--data_dir", str(folder / "data")]
    more = ["--warmup_steps", "0", "--quick_samples", "0", "--eval_on_start", "true", "--max_train_samples", "40"]
    return train.main, [*places, *SMALL, *more, "--max_length", "256"]


def instruct(folder: Path) -> tuple[Callable[[list[str]], Any], list[str]]:
    """instruction_tuning/finetune.py, with rows held out; --max_steps ends it within an epoch."""
    import finetune
    import generate_instructions

    generate_instructions.write(folder / "rows.json", 56)
    places = ["--model_name_or_path", str(causal_model(folder)), "--data", str(folder / "rows.json")]
    more = ["--held_out", "8", "--source_max_length", "32", "--target_max_length", "16", "--max_steps", "10"]
    return finetune.main, [*places, *SMALL, *more]


SCRIPTS = {"glue": glue, "e2e": e2e, "instruct": instruct}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
