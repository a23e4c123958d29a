"""A campaign on a cluster where everything is lost once: are its records those of this machine alone?

    python benchmarks/cluster_campaign.py ray slurm [--epochs 15] [--records results/cluster]
    python benchmarks/cluster_campaign.py --show results/cluster/ray.json

Five runs of a tiny random RoBERTa on generated sentences (two of them wait for a third) are run by reproduce.sh's
script on this machine alone, and with --on ray or --on slurm on a cluster that this script makes here and ends again:
two nodes of ray.cluster_utils.Cluster, or slurmctld and slurmd as one node (Debian's slurm-wlm). Of Ray a run, a
worker, the actor that holds the queue, the driver and a node are killed, each while a run has a checkpoint; of Slurm
one job is requeued by scontrol, one is preempted, and the driver is killed. Compared are the whole records but for
times, memory, date and machine, and all tensors. Exits with 1 where a run differs, or was finished not once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "NLU"), str(ROOT / "benchmarks")]

from kills import differing, result_of  # noqa: E402
from small_slurm import slurm  # noqa: E402

from vblora.io import read_json, write_json  # noqa: E402
from vblora_experiments import commands, journal, records, runs, schedule  # noqa: E402

SECONDS = 900  # that an event may take to come, on a busy machine
CAMPAIGN = ["table1", "--sizes", "base", "--tasks", "cola", "rte", "--methods", "vblora_qv", "--seeds", "0", "1"]
CAMPAIGN += ["--mnli_start"]
SMALL = ["--vector_length", "16", "--num_vectors", "16", "--max_length", "32", "--use_cpu", "true"]


def main(arguments: list[str]) -> int:
    parser = commands.one_line_errors(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    parser.add_argument("on", nargs="*", help="ray, slurm, or both")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument(
        "--records", type=Path, metavar="DIR", help="write the figures to DIR/ray.json, DIR/slurm.json too"
    )
    parser.add_argument("--show", type=Path, metavar="RECORD", help="print a record's table and stop")
    options = parser.parse_args(arguments)
    if options.show:
        print(render(read_json(options.show)))
        return 0
    if not options.on or not set(options.on) <= CLUSTERS.keys():
        raise ValueError(f"name a cluster: {' or '.join(CLUSTERS)}, not {' '.join(options.on) or 'nothing'}")
    commands.check_least(options, epochs=5)
    well = True
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), options.epochs)
        finish(campaign, "local", campaign.driver("local", "--jobs", "1"))
        for on in options.on:
            found = measure(campaign, on)
            print(render(found), flush=True)
            if options.records:
                made = {"benchmark": "cluster_campaign", **found, **records.environment()}
                write_json(options.records / f"{on}.json", made)
            well &= all(run["equal"] and run["finished"] == 1 for run in found["runs"].values())
    return 0 if well else 1


def measure(campaign: Campaign, on: str) -> dict[str, Any]:
    """The campaign on a cluster, and what its runs have in common with those of this machine."""
    folder = campaign.folder
    began = time.monotonic()
    with CLUSTERS[on](campaign) as events:
        happened = events()
    seconds = time.monotonic() - began
    found = {}
    for log in sorted((folder / "local").glob("*.log")):
        attempts = journal.attempts(folder / on / log.name)
        expected, other = result_of(log.with_suffix("")), result_of(folder / on / log.stem)
        found[log.stem] = {
            "attempts": len(attempts),
            "went_on_from": [attempt.step for attempt in attempts],
            "finished": sum(attempt.code == 0 for attempt in attempts),
            "differs_in": differing(expected, other),
            "equal": expected == other,
        }
    return {"on": on, "epochs": campaign.epochs, "seconds": round(seconds, 1), "events": happened, "runs": found}


def render(found: dict[str, Any]) -> str:
    lines = [f"| {found['on']} | processes | from the checkpoints of steps | finished | record and tensors |"]
    lines += ["| --- | ---: | --- | ---: | --- |"]
    for name, run in found["runs"].items():
        steps = ", ".join(map(str, run["went_on_from"]))
        same = "equal" if run["equal"] else f"other: {', '.join(run['differs_in'])}"
        lines.append(f"| {short(name)} | {run['attempts']} | {steps} | {run['finished']} | {same} |")
    happened = "; ".join(map(short, found["events"]))
    return "\n".join([*lines, "", f"{happened[:1].upper()}{happened[1:]}. In {found['seconds']:.0f} s."])


def short(text: str) -> str:
    """A text with the names of runs in it, without what is the same in all of them."""
    return re.sub(r"(?:roberta_base_)?(\w+?)_vblora_qv(\w*?)_vector_length\w*(_seed\d+)", r"\1\2\3", text)


class Campaign:
    """The tiny model, its data, and the command; each kind of place has a folder of runs of its own."""

    def __init__(self, folder: Path, epochs: int) -> None:
        self.folder, self.epochs = folder, epochs
        write_model_and_data(folder)

    def driver(self, on: str, *more: str) -> subprocess.Popen[bytes]:
        """The command, started; what it says is added to a file."""
        places = ["--glue_dir", str(self.folder / "glue"), "--models_dir", str(self.folder / "models")]
        places += ["--runs", str(self.folder / on), "--on", on, *more]
        flags = ["--", *SMALL, "--num_train_epochs", str(self.epochs)]
        command = [sys.executable, str(ROOT / "NLU" / "reproduce.py"), *CAMPAIGN, *places, *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = schedule.tied(command)  # it ends with this process, however that ends
        with (self.folder / f"{on}.out").open("ab") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=environment)

    def said(self, on: str) -> str:
        return (self.folder / f"{on}.out").read_text()

    def going(self, on: str, wanted: Callable[[int], bool] = lambda process: True) -> tuple[str, journal.Attempt]:
        """A run that has a checkpoint of its present process, of which `wanted` is true; waits for it."""

        def find() -> tuple[str, journal.Attempt] | None:
            for log in (self.folder / on).glob("*.log"):
                attempts = journal.attempts(log)
                if attempts and attempts[-1].code is None and _is_there(attempts[-1].process):
                    whole = runs.last_checkpoint(log.with_suffix(""))
                    step = int(whole.rpartition("-")[2]) if whole else 0
                    if step > attempts[-1].step and wanted(attempts[-1].process):
                        return log.stem, attempts[-1]
            return None

        return until(find, f"no run on {on} comes to a checkpoint: {self.said(on)[-1000:]}")

    def again(self, on: str, name: str, attempts: int) -> None:
        """Wait until a run has been started so often."""
        log = self.folder / on / f"{name}.log"
        until(lambda: len(journal.attempts(log)) >= attempts, f"{name} is not started again: {self.said(on)[-1000:]}")


def until(look: Callable[[], Any], problem: str) -> Any:
    end = time.monotonic() + SECONDS
    while not (found := look()):
        if time.monotonic() > end:
            raise ValueError(problem)
        time.sleep(0.1)
    return found


def _is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def killed_driver(campaign: Campaign, on: str, driver: subprocess.Popen[bytes], *more: str) -> subprocess.Popen[bytes]:
    """Kill the driver while a run is going, see that the run goes on, and start the command again."""
    name, before = campaign.going(on)
    driver.kill()
    driver.wait()
    name, before = campaign.going(on)
    folder = campaign.folder / on / name
    step = journal.last_step(folder)
    problem = f"{name} does not go on without the driver"
    until(lambda: journal.last_step(folder) > step or not _is_there(before.process), problem)
    return campaign.driver(on, *more)


def finish(campaign: Campaign, on: str, driver: subprocess.Popen[bytes]) -> None:
    """Wait for the end of the campaign."""
    try:
        code = driver.wait(timeout=2 * SECONDS)
    except subprocess.TimeoutExpired:
        driver.kill()
        code = -1
    if code:
        raise ValueError(f"the campaign on {on} ends with {code}: {campaign.said(on)[-1500:]}")


# ------------------------------------------------------------------------------------- Ray


@contextmanager
def on_ray(campaign: Campaign) -> Iterator[Callable[[], list[str]]]:
    """Two nodes with a core each, on this machine."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }  # else a busy machine has no time for them
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        file = campaign.folder / "cluster.json"
        write_json(file, {"ray": {"address": cluster.address, "gpus": 0, "cpus": 1, "retries": 8}})
        yield lambda: ray_events(campaign, cluster, node, ["--cluster", str(file)])
    finally:
        cluster.shutdown()


def ray_events(campaign: Campaign, cluster: Any, node: Any, more: list[str]) -> list[str]:
    def lose(what: str, find: Callable[[int], int], wanted: Callable[[int], bool] = lambda process: True) -> None:
        name, attempt = campaign.going("ray", wanted)
        count = len(journal.attempts(campaign.folder / "ray" / f"{name}.log"))
        os.kill(find(attempt.process), signal.SIGKILL)
        campaign.again("ray", name, count + 1)
        happened.append(f"{what} (of {name})")

    happened: list[str] = []
    driver = campaign.driver("ray", *more)
    lose("a run was killed", lambda process: process)
    lose("a worker was killed", parent_of)
    lose("the actor with the queue was killed", lambda process: actor())
    driver = killed_driver(campaign, "ray", driver, *more)
    happened.append("the driver was killed and started again")
    raylet = node.all_processes["raylet"][0].process.pid
    name, _ = campaign.going("ray", lambda process: parent_of(parent_of(process)) == raylet)
    count = len(journal.attempts(campaign.folder / "ray" / f"{name}.log"))
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    campaign.again("ray", name, count + 1)
    happened.append(f"a node was removed (with {name})")
    finish(campaign, "ray", driver)
    return happened


def actor() -> int:
    """The process of the actor that holds the queue."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::Queue"):
                return int(path.parent.name)
        except OSError:  # it has just ended
            continue
    raise ValueError("the actor with the queue is not on this machine")


# ------------------------------------------------------------------------------------- Slurm


@contextmanager
def on_slurm(campaign: Campaign) -> Iterator[Callable[[], list[str]]]:
    """One node with two cores, on this machine."""
    file = campaign.folder / "cluster.json"
    write_json(file, {"slurm": {"partition": "main", "gpus": 0, "cpus": 1, "hours": 1}})
    with slurm(campaign.folder / "daemons"):
        yield lambda: slurm_events(campaign, ["--cluster", str(file)])


def slurm_events(campaign: Campaign, more: list[str]) -> list[str]:
    def lose(what: str, do: Callable[[str], None]) -> None:
        name, _ = campaign.going("slurm")
        count = len(journal.attempts(campaign.folder / "slurm" / f"{name}.log"))
        do(name)
        campaign.again("slurm", name, count + 1)
        happened.append(f"{what} (of {name})")

    def requeue(name: str) -> None:
        array, place = json.loads((campaign.folder / "slurm" / ".cluster" / "slurm" / "runs.json").read_text())[name]
        numbers = told(["squeue", "--noheader", "--array", f"--name={array}", "--format=%K %i"]).splitlines()
        (number,) = [number for line in numbers for k, number in [line.split()] if k in (str(place), "N/A")]
        told(["scontrol", "requeue", number])

    happened: list[str] = []
    driver = campaign.driver("slurm", *more)
    lose("a job was requeued by scontrol", requeue)
    urgent = ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    lose("a job was preempted", lambda name: told(urgent) and None)
    driver = killed_driver(campaign, "slurm", driver, *more)
    happened.append("the driver was killed and started again")
    finish(campaign, "slurm", driver)
    return happened


def told(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


CLUSTERS = {"ray": on_ray, "slurm": on_slurm}


# ------------------------------------------------------------------------------------- model and data


def write_model_and_data(folder: Path) -> None:
    """A RoBERTa of one layer, 16 wide, with the words of the data as its vocabulary; CoLA, MNLI and RTE."""
    from transformers import BertTokenizerFast, RobertaConfig, RobertaModel

    import generate_cola

    generate_cola.write(str(folder / "glue" / "CoLA"), 64, 40, 0)
    for task, labels, names in (("MNLI", 3, ("premise", "hypothesis")), ("RTE", 2, ("sentence1", "sentence2"))):
        (folder / "glue" / task).mkdir()
        for part in ("train", "dev_matched" if task == "MNLI" else "dev"):
            rows = [{names[0]: f"a b {n}", names[1]: f"b {n % 5}", "label": n % labels} for n in range(48)]
            (folder / "glue" / task / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = {word for path in folder.glob("glue/CoLA/*.tsv") for word in path.read_text().lower().split()}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words | {"a", "b", *map(str, range(48))})]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=len(vocabulary), pad_token_id=0, max_position_embeddings=66, **sizes)
    RobertaModel(config).save_pretrained(folder / "models" / "roberta-base")
    tokenizer = BertTokenizerFast(vocab={word: at for at, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder / "models" / "roberta-base")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
