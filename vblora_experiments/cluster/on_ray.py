"""Runs as tasks of Ray core.

They belong to an actor that outlives the process that made it (a detached one), by the name of the folder that the runs
are kept in: whoever asks later finds them there. Ray itself queues them, places them by GPU, and starts those again
whose worker or node was lost, and the actor too.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vblora_experiments import journal
from vblora_experiments.cluster.settings import RaySettings
from vblora_experiments.cluster.worker import Stopped, Work
from vblora_experiments.schedule import Job, in_order
from vblora_experiments.secrets import without_secrets

NAMESPACE = "vblora"
REGISTRY = Path(".cluster") / "ray.json"  # in the folder of the runs: what each was queued with
SECONDS = 120  # that the cluster may take for an answer, as where the actor's node was lost
CONNECT = 5  # seconds to reach an address
KEPT = ("HF_", "TOKENIZERS_", "TRANSFORMERS_", "VBLORA_", "OPENAI_BASE_URL", "PYTHONPATH")


class Queue:
    """The actor. What it is to run stands in the registry, which it reads again when it was lost itself."""

    def __init__(self, registry: str) -> None:
        self.registry, self.tasks = Path(registry), dict[str, Any]()
        self.add([name for name, run in self._runs().items() if _code(run) is None])

    def add(self, names: Sequence[str]) -> None:
        """Queue these runs, each behind those it waits for; not those that wait for one that has failed."""
        import ray

        task, runs = ray.remote(_run), self._runs()
        failed = {name for name, run in runs.items() if _code(run) and name not in names}
        for name in in_order({name: runs[name]["after"] for name in names}):
            run = runs[name]
            if failed & set(run["after"]):
                failed.add(name)
                continue
            before = [self.tasks[start] for start in run["after"] if start in self.tasks]
            options = {"name": name, "retry_exceptions": [Stopped], **run["options"]}
            self.tasks[name] = task.options(**options).remote(run["work"], *before)

    def going(self) -> list[str]:
        """The runs that have not ended."""
        import ray

        names = {task: name for name, task in self.tasks.items()}
        _, left = ray.wait(list(names), num_returns=len(names), timeout=0) if names else ([], [])
        return [names[task] for task in left]

    def stop(self) -> None:
        import ray

        for name in self.going():
            ray.cancel(self.tasks[name], force=True)

    def _runs(self) -> dict[str, Any]:
        return dict(json.loads(self.registry.read_text(encoding="utf-8")))


def _run(work: dict[str, Any], *after: None) -> None:
    """A task: the run's command, when those it waits for have ended well (else Ray gives it their error)."""
    Work(**work | {"log": Path(work["log"])})()


def _code(run: dict[str, Any]) -> int | None:
    """The exit code of a run that has come to an end of its own; None of others."""
    attempts = journal.attempts(Path(run["work"]["log"]))
    code = attempts[-1].code if attempts else None
    return code if code is None or code >= 0 else None


class Ray:
    """Ray's queue, of the runs of one folder."""

    def __init__(self, folder: Path, settings: RaySettings) -> None:
        if find_spec("ray") is None:
            raise ValueError("--on ray needs Ray: pip install ray, or the extra: pip install -e '.[ray]'")
        self.folder, self.settings = folder.absolute(), settings
        self.registry, self.name = self.folder / REGISTRY, f"runs:{self.folder}"
        _connect(settings.address)

    def submit(self, jobs: Sequence[Job]) -> int:
        import ray

        from vblora.io import read_json, write_json
        from vblora_experiments.progress import alone

        with answering():
            self._require_room()
        with alone(self.registry, wait=True):
            queued = self.queued()
            new = [job for job in jobs if job.name not in queued]
            for job in new:  # what became of it before is no more
                journal.path_of(job.log).unlink(missing_ok=True)
            known = read_json(self.registry) if self.registry.exists() else {}
            runs = {name: run for name, run in known.items() if name in queued}
            write_json(self.registry, runs | {job.name: self._described(job) for job in new})
            with answering():
                if (actor := self._actor()) is not None:
                    ray.get(actor.add.remote([job.name for job in new]), timeout=SECONDS)
                elif new:
                    detached = {"name": self.name, "lifetime": "detached", "num_cpus": 0}
                    safe = {"max_restarts": -1, "max_task_retries": -1}
                    made: Any = ray.remote(Queue).options(**detached, **safe).remote(str(self.registry))
                    ray.get(made.going.remote(), timeout=SECONDS)
        return len(new)

    def queued(self) -> dict[str, str]:
        import ray

        with answering():
            actor = self._actor()
            going = [] if actor is None else ray.get(actor.going.remote(), timeout=SECONDS)
        return {name: "waiting" if self._waits(name) else "running" for name in going}

    def stop(self) -> None:
        import ray

        with answering():
            if (actor := self._actor()) is not None:
                ray.get(actor.stop.remote(), timeout=SECONDS)
                ray.kill(actor)

    def _actor(self) -> Any:
        import ray

        try:
            return ray.get_actor(self.name)
        except ValueError:  # there is none
            return None

    def _waits(self, name: str) -> bool:
        attempts = journal.attempts(self.folder / f"{name}.log")
        return not attempts or attempts[-1].code is not None

    def _described(self, job: Job) -> dict[str, Any]:
        """A job as the registry has it: what is run, after what, and what it asks Ray for."""
        own = self.settings
        given = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
        work = Work.of(job, own.cpus, without_secrets(given))
        asked = {
            "num_cpus": own.cpus,
            "num_gpus": own.gpus,
            "max_retries": own.retries,
            "memory": round(own.memory_gb * 2**30) if own.memory_gb else None,
            "accelerator_type": own.accelerator,
        }
        options = {name: value for name, value in asked.items() if value is not None}
        return {"work": asdict(work) | {"log": str(work.log)}, "after": job.after, "options": options}

    def _require_room(self) -> None:
        """Refuse runs that no node has room for: Ray would let them wait for ever."""
        import ray

        own = self.settings
        need = {"CPU": own.cpus, "GPU": own.gpus, "memory": (own.memory_gb or 0) * 2**30}
        if own.accelerator:
            need[f"accelerator_type:{own.accelerator}"] = 0.001
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if own.wait_for_nodes or any(all(node.get(n, 0) >= amount for n, amount in need.items()) for node in nodes):
            return
        there = "; ".join(f"{node.get('CPU', 0):g} cores, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ValueError(
            f"--on ray: no node has room for a run of {own.cpus} cores and {own.gpus} GPUs"
            f"{f' of kind {own.accelerator}' if own.accelerator else ''} (the nodes have {there}): "
            "change the part ray of --cluster, or set wait_for_nodes in it where nodes are still to come"
        )


def _connect(address: str) -> None:
    """Join the cluster.

    Raises:
        ValueError: it cannot be reached, or does not take this process.
    """
    import ray

    host, _, port = address.rpartition(":")
    if address != "auto":
        if not host or not port.isdecimal() or "/" in address:
            raise ValueError(f'--on ray: the address {address!r} is neither "auto" nor HOST:PORT of `ray start --head`')
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"--on ray: {address} cannot be reached: {error}") from None
    if ray.is_initialized():  # a caller in Python is in a cluster already
        return
    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
        said = str(error).strip().splitlines() or ["it does not say why"]
        raise ValueError(f"--on ray: the cluster at {address} does not take this process: {said[0]}") from error


@contextmanager
def answering() -> Iterator[None]:
    """What Ray says of a cluster that is gone, as one line."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"--on ray: the cluster does not answer: {said[0]}; the same command finds its runs"
        ) from error
