"""What each process of test_two_machines.py does; torchrun starts it on both "machines", and again after a loss.

Each case is a run of instruction tuning by its command line. In the first the process of rank 1 is lost at its third
step, once: the agents start both anew, and the run goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
STEPS = 5
CASES = {"ddp": [], "nf4": ["--bits", "4"], "fsdp2": ["--save_strategy", "no"]}


def flags(place, case, rows):
    """A run of `rows` rows a process and step, on the model and the data in `place`."""
    places = {"--model_name_or_path": place / "model", "--data": place / "rows.json", "--output_dir": place / case}
    numbers = {"--max_steps": STEPS, "--per_device_train_batch_size": rows, "--logging_steps": 1, "--save_steps": 2}
    adapter = {"--num_vectors": 12, "--vector_length": 16, "--topk": 2, "--learning_rate_vector_bank": 1e-2}
    others = {"--save_strategy": "steps", "--train_sampling_strategy": "random", "--use_cpu": "true"}
    limits = {"--source_max_length": 160, "--target_max_length": 12, "--disable_tqdm": "true"}
    told = {**places, **numbers, **adapter, **others, **limits}
    return [*(str(word) for pair in told.items() for word in pair), *CASES[case.removeprefix("one_")]]


def train(place, case, rows):
    from vblora_experiments import instruct

    folder = instruct.Folder("test", {"data_format": "alpaca", "data": "hub/name"}, {}.get, place)
    instruct.main(flags(place, case, rows), folder)


def lose_one_process(place):
    """Rank 1 ends without a word in its third step, unless that has happened before."""
    import vblora

    step, taken = vblora.AdamW.step, []

    def counted(self, *arguments):
        taken.append(1)
        if len(taken) == 3:
            (place / "lost").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments)

    if os.environ["RANK"] == "1" and not (place / "lost").exists():
        vblora.AdamW.step = counted


def as_accelerate_launch():
    """What `accelerate launch --config_file fsdp2.yaml` tells its processes, and what accelerate does on GPUs.

    On the CPU it leaves FSDP out, so that these processes say they are of a kind that it takes.
    """
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    config = yaml.safe_load((ROOT / "instruction_tuning" / "configs" / "fsdp2.yaml").read_text())["fsdp_config"]
    config["fsdp_transformer_cls_to_wrap"] = config.pop("fsdp_transformer_layer_cls_to_wrap")
    os.environ |= {name.upper(): str(value) for name, value in config.items()} | {"ACCELERATE_USE_FSDP": "true"}
    prepare = PartialState._prepare_backend
    PartialState._prepare_backend = lambda *told, **more: (prepare(*told, **more)[0], DistributedType.MULTI_XPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def watch_sharding(place):
    """Note what FSDP2 has left whole, and the bytes that this process holds of the rest."""
    from torch.distributed.tensor import DTensor

    from vblora.trainer import AdapterTrainer

    inner = AdapterTrainer.training_step

    def watched(self, model, *arguments, **more):
        named = dict(model.named_parameters())
        whole = sorted(name for name, p in named.items() if not isinstance(p, DTensor))
        share = sum(p.to_local().nbytes for p in named.values() if isinstance(p, DTensor))
        of_all = sum(p.nbytes for p in named.values() if isinstance(p, DTensor))
        found = {"whole": whole, "bytes": share, "of": of_all}
        (place / f"divided_{os.environ['RANK']}.json").write_text(json.dumps(found))
        return inner(self, model, *arguments, **more)

    AdapterTrainer.training_step = watched


def refused(place):
    """What is said where each machine has a folder of its own, of which one holds a checkpoint."""
    from vblora_experiments import training_run

    own = place / f"own_{os.environ['RANK']}"
    own.mkdir(exist_ok=True)
    if os.environ["RANK"] == "0":
        (own / "checkpoint-2").mkdir(exist_ok=True)
        (own / "checkpoint-2" / "trainer_state.json").write_text("{}")
    try:
        training_run.require_shared(own)
    except ValueError as error:
        (own / "said").write_text(str(error))


def main(place):
    import torch

    from vblora_experiments import runs

    torch.set_num_threads(1)
    with (place / "starts").open("a") as starts:  # one short line, which is written whole
        starts.write(f"rank {os.environ['RANK']} {Path(runs.last_checkpoint(place / 'ddp') or 'anew').name}\n")
    lose_one_process(place)
    for case in CASES:
        if case == "fsdp2":
            as_accelerate_launch()
            watch_sharding(place)
        train(place, case, 2)
        torch.distributed.barrier()
    refused(place)
    torch.distributed.barrier()
    os._exit(0)  # not by way of the interpreter's end, in which gloo's threads have been seen to wait for ever


if __name__ == "__main__":
    main(Path(sys.argv[1]))
