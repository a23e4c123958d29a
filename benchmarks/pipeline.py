"""Where the time of a whole training run goes: in the model, and outside of it. GLUE's and E2E's scripts as they are.

    python benchmarks/pipeline.py [--runs glue e2e] [--method vblora] [--rows 1000] [--epochs 2] [--record FILE]
    python benchmarks/pipeline.py --runs glue --data_dir DIR [--task cola] [--model DIR]

NLU/run_glue.py on the small encoder (its row for CoLA) and NLG/train.py on a Llama of 12 layers, 512 wide, with random
weights, on generated data; or on other data and another model. In the model: forward, backward, the optimiser with the
clipping of gradients, and in evaluations forward and decoding. All else from the script's start to its end is outside,
by part; a part within another counts for itself alone. What is done once (reading, tokenising, loading the model)
stands apart from what each step and epoch does again.

Last result (results/speed/pipeline*.json): outside the model 3.5% of a run on CoLA, 0.7% of one on E2E's form.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from transformers import DataCollatorWithPadding, GenerationMixin, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer
from turns import report, require_positive

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "NLG"), str(ROOT / "NLU")]  # first: NLG has a generation.py too

import generate_cola  # noqa: E402
import generate_e2e  # noqa: E402
import quick_validation  # noqa: E402
import run_glue  # noqa: E402
import train  # noqa: E402
from glue_tasks import TASKS  # noqa: E402
from vblora.adapter import Adapter  # noqa: E402
from vblora.optim import AdamW  # noqa: E402
from vblora.trainer import AdapterTrainer, KeepBest  # noqa: E402
from vblora_experiments import causal, commands  # noqa: E402
from vblora_experiments.command_line import Settings  # noqa: E402
from vblora_experiments.selection_log import SelectionLog  # noqa: E402

GOAL = 0.05
TRAINING, EVALUATION = "training: forward", "evaluation: forward"
MODEL = (TRAINING, "training: backward", "training: optimiser", EVALUATION, "evaluation: decoding")
ONCE = ("reading data", "tokenising", "loading the model", "beginning: else")
REST = "training: else"
# What is wrapped, and the part it belongs to; what is called within another counts for itself.
PARTS: list[tuple[Any, str, str]] = [
    (accelerate.Accelerator, "backward", "training: backward"),
    (accelerate.Accelerator, "clip_grad_norm_", "training: optimiser"),
    (AdamW, "step", "training: optimiser"),
    (GenerationMixin, "generate", "evaluation: decoding"),
    (run_glue, "load_task", "reading data"),
    (train, "load_split", "reading data"),
    (run_glue, "tokenize", "tokenising"),
    (train, "encode", "tokenising"),
    (run_glue, "build", "loading the model"),
    (train, "load_model", "loading the model"),
    (train, "load_tokenizer", "loading the model"),
    (train, "apply_method", "loading the model"),
    (AdapterTrainer, "train", REST),
    (accelerate.Accelerator, "free_memory", "beginning: else"),  # a garbage collection as training begins
    (_MapDatasetFetcher, "fetch", "batches: rows"),
    (DataCollatorWithPadding, "__call__", "batches: padding"),
    (causal.Padded, "__call__", "batches: padding"),
    (SelectionLog, "on_step_end", "selection log"),
    (SelectionLog, "on_epoch_end", "selection log"),
    (SelectionLog, "write", "selection log"),
    (AdapterTrainer, "evaluate", "evaluation: else"),
    (quick_validation.QuickValidation, "on_evaluate", "evaluation: quick scores"),
    (AdapterTrainer, "log", "logging"),
    (AdapterTrainer, "_save_checkpoint", "saving"),
    (KeepBest, "on_evaluate", "saving"),
    (Adapter, "save", "saving"),
]


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.runs:
            results[name] = measure(SETTINGS[name](options, Path(folder)), RUN[name])
    shape = {name: getattr(options, name) for name in ("method", "task", "rows", "epochs")}
    text = "\n\n".join(render(name, found) for name, found in results.items())
    report("pipeline", {**shape, "runs": results}, text, options.record)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--method", choices=["vblora", "lora"], default="vblora")
    parser.add_argument("--task", choices=list(TASKS), default="cola", help="of GLUE; data is generated for cola alone")
    parser.add_argument("--data_dir", help="the run's data, where --runs is one")
    parser.add_argument("--model", help="a folder of the run's model, where --runs is one")
    parser.add_argument("--rows", type=int, default=1000, help="for training; a tenth of them are for evaluation")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="64 rows, one epoch, a tiny causal model")
    parser.add_argument("--record", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    if options.small:
        options.rows, options.epochs = 64, 1
    require_positive(options, "rows", "epochs")
    if len(options.runs) > 1 and (options.data_dir or options.model):
        raise ValueError("--data_dir and --model are for one run: name it with --runs")
    if options.task != "cola" and options.data_dir is None:
        raise ValueError(f"--task {options.task} needs --data_dir: data is generated for cola alone")
    return options


# ------------------------------------------------------------------------------------------ the runs


def glue(options: argparse.Namespace, folder: Path) -> Settings:
    """A run of NLU/run_glue.py."""
    data = options.data_dir
    if data is None:
        data = str(folder / "cola")
        generate_cola.write(data, options.rows, max(20, options.rows // 10), 0)
    method = {"vblora": "vblora_all", "lora": "lora_qv"}[options.method]
    told = {"row": f"minilm/{options.task}/{method}", "data_dir": data, "model_name_or_path": options.model}
    return run_glue.of({**told, **_common(options, folder / "glue")})


def e2e(options: argparse.Namespace, folder: Path) -> Settings:
    """A run of NLG/train.py."""
    data = options.data_dir
    if data is None:
        data = str(folder / "e2e")
        evaluated = max(8, options.rows // 30)  # of each representation there are three references
        generate_e2e.write(Path(data), options.rows, evaluated, evaluated, 0)
    model = options.model or str(write_causal(folder / "model", Path(data), options.small))
    told = {"model_name_or_path": model, "data_dir": data, "method": options.method, "learning_rate": 1e-3}
    told |= {"rank": 4, "max_eval_samples": max(8, options.rows // 10), "warmup_steps": 0}
    if options.method == "vblora":
        told |= {"num_vectors": 256, "vector_length": 32 if options.small else 64}
    told |= {"quick_samples": 4 if options.small else 32, **_common(options, folder / "e2e_run")}
    return train.SCRIPT.of(told)


def _common(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    told = {"max_train_samples": options.rows, "num_train_epochs": options.epochs, "output_dir": out}
    return {**told, "report_to": "none", "disable_tqdm": True}


SETTINGS: dict[str, Callable[[argparse.Namespace, Path], Settings]] = {"glue": glue, "e2e": e2e}
RUN: dict[str, Callable[[Settings], Any]] = {"glue": run_glue.run, "e2e": train.train}


def write_causal(folder: Path, data: Path, small: bool) -> Path:
    """A Llama with random weights, and a tokenizer made from the data."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    with (data / "trainset.csv").open(encoding="utf-8") as file:
        inner.train_from_iterator((" ".join(row) for row in csv.reader(file)), trainer)
    tokenizer = FastTokenizer(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    width, layers = (64, 1) if small else (512, 12)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------ the clock


class Clock:
    """Seconds by part; a part within another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        """Give the time since the last turn to the innermost part."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what a part has begun on the GPU is its own
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def wrapped(self, function: Callable[..., Any], part: str | Callable[..., str]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **named: Any) -> Any:
            with self.part(part if isinstance(part, str) else part(*args)):
                return function(*args, **named)

        return timed


def measure(settings: Settings, run: Callable[[Settings], Any]) -> dict[str, Any]:
    """Seconds of every part of a run, the largest first, and the shares outside the model."""
    clock = Clock()
    wrapped: list[tuple[Any, str, str | Callable[..., str]]] = [*PARTS, (AdapterTrainer, "compute_loss", _pass)]
    with contextlib.ExitStack() as undo:
        for owner, name, part in wrapped:
            own = vars(owner).get(name)  # None where it is inherited
            undo.callback(delattr, owner, name) if own is None else undo.callback(setattr, owner, name, own)
            setattr(owner, name, clock.wrapped(getattr(owner, name), part))
        with clock.part("beginning: else"):
            run(settings)
    seconds = dict(sorted(clock.seconds.items(), key=lambda item: -item[1]))
    whole, in_model = sum(seconds.values()), sum(seconds.get(part, 0.0) for part in MODEL)
    once = sum(seconds.get(part, 0.0) for part in ONCE)
    return {
        "seconds": seconds,
        "whole": whole,
        "in_model": in_model,
        "outside_share": (whole - in_model) / whole,
        "outside_share_without_once": (whole - once - in_model) / (whole - once),
    }


def _pass(trainer: AdapterTrainer, model: torch.nn.Module, *_: Any) -> str:
    return TRAINING if model.training else EVALUATION


def render(name: str, found: dict[str, Any]) -> str:
    lines = [f"| {name} | seconds | share |", "|---|---:|---:|"]
    for part, taken in found["seconds"].items():
        mark = " (model)" if part in MODEL else " (once)" if part in ONCE else ""
        lines.append(f"| {part}{mark} | {taken:.2f} | {taken / found['whole']:.1%} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{found['outside_share']:.1%} of {found['whole']:.1f} s outside the model; without what is done once "
            f"{found['outside_share_without_once']:.1%}. Goal: at most {GOAL:.0%}.",
        ]
    )


if __name__ == "__main__":
    commands.run(main, "pipeline")
