"""What a cluster is asked for: the file of --cluster, in YAML or JSON, with a part for each kind of cluster.

slurm:
  partition: gpu
  account: my-project
  hours: 24
  gpus: 1
ray:
  address: 10.0.0.1:6379
  gpus: 1
"""

from __future__ import annotations

import math
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from vblora_experiments.config_files import check_keys, read_config

Kind = TypeVar("Kind")
WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list of texts"}
LEAST = {"gpus": 0, "cpus": 1, "hours": 1 / 60, "memory_gb": 0.001, "at_a_time": 1, "timeouts": 0, "retries": -1}


@dataclass(frozen=True)
class SlurmSettings:
    """What each run asks Slurm for.

    Attributes:
        partition, account: Slurm's own choice unless given.
        hours: at most, of one run before it is queued again.
        gpus, cpus, memory_gb: of one run.
        at_a_time: runs of one array.
        timeouts: how often a run may be queued again because its hours were over (preemption does not count).
        setup: lines of shell before each run, such as "module load cuda".
        options: further flags of sbatch by their names, such as {qos: low, constraint: a100}.
    """

    partition: str | None = None
    account: str | None = None
    hours: float = 24
    gpus: int = 1
    cpus: int = 4
    memory_gb: float | None = None
    at_a_time: int = 256
    timeouts: int = 10
    setup: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RaySettings:
    """What each run asks Ray for.

    Attributes:
        address: HOST:PORT, as `ray start --head` prints it; "auto" for the cluster that this machine is in.
        gpus, cpus, memory_gb: of one run.
        accelerator: only on nodes with such GPUs, by Ray's name for them: A100, H100, ...
        retries: how often a run is started again whose worker or node was lost; -1 for always.
        wait_for_nodes: take runs that no node of now has room for, where nodes come and go.
    """

    address: str = "auto"
    gpus: int = 1
    cpus: int = 4
    memory_gb: float | None = None
    accelerator: str | None = None
    retries: int = 3
    wait_for_nodes: bool = False


PARTS: dict[str, type] = {"slurm": SlurmSettings, "ray": RaySettings}


def read(path: Path | None, part: str) -> Any:
    """The settings of one kind of cluster: the defaults where there is no file, or it has no such part.

    Raises:
        ValueError: no such file, or something in it is unknown or wrong.
    """
    values = {} if path is None else read_config(path, list(PARTS), "--cluster")
    for name, found in values.items():
        values[name] = _part(PARTS[name], found, f"--cluster {path}: {name}")
    return values.get(part, PARTS[part]() if part in PARTS else None)


def _part(kind: type[Kind], values: Any, where: str) -> Kind:
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds no map of settings")
    check_keys(values, [f.name for f in fields(kind)], where)  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    return kind(**{name: _checked(value, name, hints[name], where) for name, value in values.items()})


def _checked(value: Any, name: str, hint: Any, where: str) -> Any:
    kinds = {
        typing.get_origin(k) or k for k in (typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint])
    }
    if type(value) is int and float in kinds:
        value = float(value)
    texts = type(value) is not list or all(type(line) is str for line in value)
    if type(value) not in kinds or not texts:
        raise ValueError(f"{where}: {name} is {' or '.join(WORDS[k] for k in kinds if k in WORDS)}, not {value!r}")
    if type(value) in (int, float) and not LEAST[name] <= value < math.inf:
        raise ValueError(f"{where}: {name} must be at least {LEAST[name]:.3g}, not {value}")
    return value
