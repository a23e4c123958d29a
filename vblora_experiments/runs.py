"""One identity of a run: what decides its result, and whether a folder or a record is of it.

A run is its plan: every setting that decides the result, with fingerprints of the data and the model in place of where
they lie. The folder of a run holds the plan (run.json) and, once the run is finished, the record (record.json), which
has the plan as "settings". A `Trial` is a run of a table before it has a plan: a row and what is changed of it.
Whether two of these are the same run is decided by `differences` alone.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vblora.config import FORMS
from vblora.io import folder_fingerprint, read_json, write_json
from vblora.models import PLAN_FILE, RECORD_FILE, TRAINING_FILE, model_name
from vblora.switch import read_config_file
from vblora_experiments.arguments import OF_RECIPE, MethodArguments, given, split
from vblora_experiments.secrets import without_secrets

LOCK_FILE = ".lock"
LOCK_SECONDS = "VBLORA_LOCK_SECONDS"
LOCK_POLL = 0.5  # seconds
HELD = (errno.EAGAIN, errno.EACCES)  # what flock says of a lock that another process holds; all else is no lock
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")  # as `vblora.io.replacing` calls what it writes first
# What may differ when a run goes on where it stopped: where things are, and how they are shown.
FREE_TO_CHANGE = {
    *("output_dir", "logging_dir", "disable_tqdm", "report_to", "resume_from_checkpoint", "data_dir", "use_cpu"),
    *("dataloader_pin_memory", "row", "push_to_hub", "hub_model_id", "hub_revision", "hub_private_repo"),
}
# What no plan has: also where the data come from (their fingerprint counts), and what a run is only told at its start.
NOT_IN_PLAN = FREE_TO_CHANGE | {*("data", "config", "plan", "tflops", "device_map", "cache_dir", "cache_encoder")}
# What beside them makes no other experiment of a run: the record has it in its own place.
NEUTRAL = NOT_IN_PLAN | {
    *("seed", "model_name_or_path", "start_from", "bank_from", "bench_dir", "gsm8k", "math", "judge"),
    *("decode_batch_size", "solve_batch_size", "judge_workers", "cache_dir", "cache_encoder"),
}
STARTS = ("start_from", "bank_from")  # what a run may begin with; the plan has a fingerprint of it
# Training arguments that a plan has even where they are at their default.
ALWAYS = ("seed", "learning_rate", "num_train_epochs", "weight_decay")


# ------------------------------------------------------------------------------------- the comparison


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in which two runs differ, in alphabetical order; a setting that is None is not there."""
    before, now = todays(before), todays(now)
    names = (before.keys() | now.keys()) - FREE_TO_CHANGE
    return sorted(name for name in names if not _same(name, before.get(name), now.get(name)))


def todays(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the names of today: instructions' "data_format" was a "form" once, as an adapter file's is."""
    if settings.get("form") in (None, *FORMS):
        return dict(settings)
    return {"data_format" if name == "form" else name: value for name, value in settings.items()}


def in_words(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings in which two runs differ, each with both values; "" for none."""
    before, now = todays(before), todays(now)
    return ", ".join(f"{n}: {before.get(n)} before, {now.get(n)} now" for n in differences(before, now))


def is_on(value: Any) -> bool:
    """Whether a switch is on, as a value or as the text of a flag."""
    return str(value).lower() in ("true", "1", "yes", "y", "t", "on")


def _same(name: str, one: Any, other: Any) -> bool:
    if name == "model_name_or_path":  # a record has a local model's folder name
        return str(one).rpartition("/")[2] == str(other).rpartition("/")[2]
    if isinstance(one, str) and not isinstance(other, str):  # flags and the changes of a trial are text
        one, other = other, one
    if isinstance(one, bool) and isinstance(other, str):
        return str(one).lower() == other.lower()
    if isinstance(one, (int, float)) and isinstance(other, str):
        try:
            return one == float(other)
        except ValueError:
            return False
    return bool(one == other)


# ------------------------------------------------------------------------------------- plans


def make_plan(
    task: Any, method: MethodArguments, training: Any, data_fingerprint: str, model: str | None = None
) -> dict[str, Any]:
    """All that decides the result of a run; two runs of one plan are the same run.

    Args:
        task: the dataclass of the task's own flags, with `model_name_or_path`.
        method: the method and its settings.
        training: transformers' TrainingArguments.
        data_fingerprint: of the rows in use.
        model: the model's folder, where that is not what `task` names.
    """
    plan = {**given(task), **given(method), **training_settings(training), "data_fingerprint": data_fingerprint}
    plan = {name: value for name, value in plan.items() if name not in NOT_IN_PLAN}
    plan |= {name: folder_fingerprint(Path(plan[name])) for name in STARTS if name in plan}
    plan |= {f"learning_rate_{n.removeprefix('lr_')}": rate for n, rate in method.rates().items() if rate is not None}
    folder = Path(model or task.model_name_or_path)
    if folder.is_dir():
        plan["model_fingerprint"] = folder_fingerprint(folder)
    if method.method.endswith(".json"):
        plan["method"] = Path(method.method).name
        plan["method_file"] = read_config_file(method.method)
    plan["model_name_or_path"] = model_name(task.model_name_or_path)
    return plan


def training_settings(training: Any) -> dict[str, Any]:
    """The training arguments that are not at their default, and those that decide the result.

    Raises:
        ValueError: a rate that is no finite number of at least 0.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(training)}
    values = {name: getattr(training, name) for name in defaults}
    for name in ("learning_rate", "weight_decay"):
        if not 0 <= values[name] < math.inf:
            raise ValueError(f"--{name} must be a number of at least 0, not {values[name]:g}")
    kinds = (str, int, float, bool, dict, list)
    plain = {n: v for n, v in values.items() if isinstance(v, kinds)}
    return without_secrets({n: getattr(v, "value", v) for n, v in plain.items() if n in ALWAYS or v != defaults[n]})


def _training_defaults() -> dict[str, Any]:
    """The training arguments at their defaults, which a plan leaves out."""
    from transformers import TrainingArguments  # takes seconds

    found = {f.name: getattr(f.default, "value", f.default) for f in dataclasses.fields(TrainingArguments)}
    return {name: value for name, value in found.items() if isinstance(value, (str, int, float, bool))}


def plan_print(plan: Mapping[str, Any]) -> str:
    """SHA-256 of what makes a run this one: the same for plans without `differences`."""
    same = {n: v for n, v in todays(plan).items() if n not in FREE_TO_CHANGE and v is not None}
    same["model_name_or_path"] = str(same.get("model_name_or_path")).rpartition("/")[2]
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------- folders


def begin(directory: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Start, or go on with, the run of this plan in a directory.

    Returns:
        The record, where the run has been finished already; else None.

    Raises:
        ValueError: the directory holds a run of another plan, or another process trains into it now.
    """
    _lock(directory)
    if (directory / PLAN_FILE).exists():
        changed = in_words(read_json(directory / PLAN_FILE), plan)
        if changed and _has_results(directory):
            raise ValueError(
                f"{directory} holds a run with other settings ({changed}): give another place "
                "(--output_dir; for reproduce.sh --runs), or remove it"
            )
        if (directory / RECORD_FILE).exists():
            return read_json(directory / RECORD_FILE)
    write_json(directory / PLAN_FILE, plan)
    return None


def finished(directory: Path, part: str, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a run that has come to its end, where there is one.

    Raises:
        ValueError: this part of it (how it was decoded or tested) is not as wanted.
    """
    if not (directory / RECORD_FILE).exists():
        return None
    record = read_json(directory / RECORD_FILE)
    if changed := in_words(record[part], wanted):
        raise ValueError(f"{directory} holds a run with another {part} ({changed}): give another --output_dir")
    return record


def finish(directory: Path, record: dict[str, Any]) -> None:
    """Write the record of a run that has come to its end."""
    write_json(directory / RECORD_FILE, record)


def last_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint of an interrupted run."""
    found = {int(p.name.removeprefix("checkpoint-")): p for p in directory.glob("checkpoint-*") if _is_whole(p)}
    return str(found[max(found)]) if found else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the checkpoint was written to its end: the trainer's state is the last file that Trainer writes."""
    if not checkpoint.name.removeprefix("checkpoint-").isdecimal():
        return False
    try:
        read_json(checkpoint / "trainer_state.json")
    except ValueError:
        return False
    return True


def _has_results(directory: Path) -> bool:
    """Whether a run has come to more than its plan: one stopped by a wrong setting must not block the right one."""
    # training.json is all that a model leaves which is used as it is
    kept = any((directory / name).exists() for name in (RECORD_FILE, TRAINING_FILE, "best", "last"))
    return kept or last_checkpoint(directory) is not None


_locks: dict[Path, Any] = {}  # the open lock files of this process


def _lock(directory: Path) -> None:
    """Keep other processes out of a run's folder until this one ends. (Of a distributed run, the first one does.)

    Where VBLORA_LOCK_SECONDS is set, who holds it has so long to end: on a cluster a run may be started anew before its
    old process is gone. The lock holds between machines where flock does on their file system (docs/cluster.md).
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    if directory.resolve() in _locks or os.environ.get("RANK", "0") != "0":
        return
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / LOCK_FILE).open("a+")  # for writing, as NFS asks for
    until = time.monotonic() + float(os.environ.get(LOCK_SECONDS) or 0)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in HELD:
                raise ValueError(f"{directory} is on a file system without locks ({error.strerror})") from error
            if time.monotonic() >= until:
                file.seek(0)
                by = file.read(200).strip()
                file.close()
                who = f"another process{f' ({by})' if by else ''} trains into {directory}"
                raise ValueError(f"{who}: wait for it, or end it") from error
        time.sleep(LOCK_POLL)
    _locks[directory.resolve()] = file
    with suppress(OSError):  # on a full disk the lock holds as well
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
    _sweep(directory)  # with the lock nobody else writes here


def _sweep(directory: Path) -> None:
    """Remove the temporary files that a killed run has left among what it writes."""
    for folder in (directory, *(directory / name for name in ("last", "best")), *directory.glob("checkpoint-*")):
        for path in folder.glob(".*") if folder.is_dir() else ():
            if TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink()


# ------------------------------------------------------------------------------------- runs of a table


def overrides(arguments: list[str]) -> dict[str, str]:
    """What was given beside --row, the seed and what does not decide the result: empty for the table's own run."""
    parts = split(arguments)
    values: dict[str, str] = {}
    for flag, value in zip_longest(parts, parts[1:], fillvalue="--"):
        if flag.startswith("--"):
            values[flag.removeprefix("--").replace("-", "_")] = "true" if value.startswith("--") else value
    return real_flags(values)


def real_flags(flags: Mapping[str, str]) -> dict[str, str]:
    """Of some flags those that make another experiment of a run."""
    return without_secrets({flag: value for flag, value in flags.items() if flag not in NEUTRAL})


@dataclass(frozen=True)
class Trial:
    """One run of a table: a row of the hyper-parameters, under some changes, for one seed.

    Attributes:
        row: its name, parts with "/" between, the model first and the method last.
        variant: the name of the changes; "" for the row as it is.
        changes: the changes, as flags of the run.
        seed: of the run.
        extra: flags that go to every run of a table.
        scores: what the record must have scores by or of, such as a judge.
    """

    row: str
    variant: str = ""
    changes: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)
    scores: tuple[str, ...] = ()

    def row_flags(self) -> dict[str, Any]:
        """The flags that the row stands for now."""
        raise NotImplementedError

    @property
    def starts(self) -> set[str]:
        """What the run begins with, of STARTS."""
        return set()

    @property
    def model(self) -> str:
        return self.row.split("/")[0]

    @property
    def method(self) -> str:
        return self.row.split("/")[-1]

    @property
    def name(self) -> str:
        """Of the run's folder."""
        parts = [*self.row.split("/"), *self.marks()]
        parts += [f"{flag}_{value}".replace("/", "_") for flag, value in self.extra.items()]
        return "_".join(part for part in [*parts, f"seed{self.seed}"] if part)

    def marks(self) -> list[str]:
        """What the name says besides row, flags and seed."""
        return [self.variant]

    @property
    def overrides(self) -> dict[str, str]:
        """All flags beside the row's."""
        return {**self.extra, **self.changes}

    def is_of(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is this trial's, made with the numbers that its row has now, and with all its scores."""
        return (
            record.get("row") == self.row
            and record["seed"] == self.seed
            and not differences(record["overrides"], self.overrides)
            and not self.differences(record)
            and self.starts == {name for name in STARTS if name in record["settings"]}
            and record["scores"].keys() >= set(self.scores)
        )

    def differences(self, record: Mapping[str, Any]) -> list[str]:
        """The flags whose values in the record are not those of the row and its changes."""
        settings = {**record.get("decoding", {}), **record.get("testing", {}), **todays(record["settings"])}
        flags = {**self.row_flags(), **self.overrides}
        if is_on(self.overrides.get("recipe")) and not self.row_flags().get("recipe"):
            # The recipe goes before the row's numbers; a record that has them is of a version in which it did not.
            own = {name for name in OF_RECIPE if name not in self.overrides}
            if kept := sorted(own & settings.keys()):
                return kept
            flags = {name: value for name, value in flags.items() if name not in own}
        # A record leaves out what is at its default.
        known = settings if flags.keys() <= settings.keys() else {**_training_defaults(), **settings}
        shared = flags.keys() & known.keys()
        return differences({name: known[name] for name in shared}, {name: flags[name] for name in shared})
