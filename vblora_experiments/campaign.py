"""A table of the paper as runs: plan them, run those that have no record yet, print the table of all records.

A task folder brings a `Campaign`: which runs its tables are made of, the command of one run, and how records become a
table. What is the same for all is here: options, skipping what is finished, estimates, devices, collecting.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from vblora.io import replacing, write_json
from vblora.models import RECORD_FILE
from vblora_experiments import board, commands, records, schedule, tables
from vblora_experiments.arguments import split
from vblora_experiments.cluster import follow, settings, shared_locks, watch
from vblora_experiments.rows import Rows, check_names
from vblora_experiments.runs import Trial, real_flags
from vblora_experiments.secrets import is_secret

LOCAL = "local"  # where runs run unless --on says otherwise
Groups = Mapping[str, list[dict[str, Any]]]  # the records of each row
Found = tuple[Path, dict[str, Any]]  # a record, and its file


class Campaign(ABC):
    """What a task folder brings to reproduce its tables. `--help` begins with the docstring of its module.

    Attributes:
        runs: where runs are kept unless `--runs` says otherwise.
        kind: what its records say under "experiment".
        script: what makes one run.
        filters: the options that are lists, of which nothing is taken twice.
        folders: the options that must be folders where they are given.
        own_flags: flags of a run that the plan decides, refused after "--".
    """

    runs: Path
    kind: str
    script: Path
    filters: tuple[str, ...] = ("sizes", "methods", "seeds")
    folders: tuple[str, ...] = ("data_dir", "models_dir")
    own_flags: frozenset[str] = frozenset(
        {"row", "seed", "output_dir", "model_name_or_path", "data_dir", "config", "plan"}
    )

    @abstractmethod
    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the experiment's name and what filters it; "seeds" among them."""

    @abstractmethod
    def plan(self, options: argparse.Namespace, extra: Mapping[str, str]) -> Sequence[Trial]:
        """The trials of the experiment, under its filters. Raises ValueError for unknown names."""

    @abstractmethod
    def check_places(self, trials: Sequence[Any], options: argparse.Namespace) -> None:
        """Raise ValueError, before anything is run, for folders that do not hold what the runs need."""

    def check_flags(self, command: list[str]) -> None:
        """Raise ValueError for flags that the script of this command would refuse."""
        importlib.import_module(self.script.stem).parse(command)  # takes seconds, as transformers does

    @abstractmethod
    def job(self, trial: Any, options: argparse.Namespace, extra: Mapping[str, str]) -> schedule.Job:
        """The command of one run."""

    @abstractmethod
    def table(
        self,
        trials: Sequence[Any],
        found: Sequence[dict[str, Any]],
        options: argparse.Namespace,
        extra: Mapping[str, str],
    ) -> str | None:
        """The table in `options.format`; None where no trial has a record."""

    def title(self, options: argparse.Namespace) -> str:
        """What the plan is headed with; "" for nothing."""
        return ""

    def starts(self, trials: Sequence[Any], options: argparse.Namespace) -> tuple[Sequence[Any], Sequence[Any]]:
        """The runs that others start from: all of them, and those that are not there yet."""
        return (), ()

    def estimate(self, trial: Any, found: Sequence[dict[str, Any]]) -> tuple[float | None, str]:
        """Minutes that a run may take, and what that is taken from."""
        of_row = [r["train_seconds"] / 60 for r in found if r.get("row") == trial.row and r.get("train_seconds")]
        return (median(of_row), "from this row's records") if of_row else (None, "")

    def kept(self, trial: Any, run: str) -> dict[str, str]:
        """What else of a run is worth keeping: the file's place in the run's folder, and that beside its record.

        Nothing, unless a campaign says otherwise.

        Args:
            trial: of the run.
            run: the name of its folder.
        """
        return {}

    def keep(self, trial: Any, record_file: Path, folder: Path) -> None:
        """Copy what else of a run is worth keeping into the folder of collected records."""
        own = record_file.name == RECORD_FILE  # else it was collected before
        for place, collected in self.kept(trial, record_file.parent.name).items():
            source, target = record_file.parent / (place if own else collected), folder / collected
            if source.exists() and source != target:
                with replacing(target) as temporary:
                    shutil.copyfile(source, temporary)


@dataclass(frozen=True)
class RowTrial(Trial):
    """A row MODEL/METHOD of a table of numbers, for one seed."""

    rows: Rows = field(kw_only=True, repr=False)

    def row_flags(self) -> dict[str, Any]:
        return self.rows.row(self.row)


class RowCampaign(Campaign):
    """A campaign whose rows are MODEL/METHOD and whose models may lie in --models_dir by their names.

    Attributes:
        rows: the table of numbers.
        experiment: its name on the command line.
        models_flag: the option that chooses models.
        models: their names in `rows` by those on the command line.
        chosen: models, methods and seeds unless others are given.
        passed_on: the options that go to the run as they are.
        files: those of them that may name a file; "none" and a name on the hub do not.
    """

    rows: Rows
    experiment: str
    models_flag: str = "models"
    models: Mapping[str, str]
    chosen: tuple[Sequence[str], Sequence[str], Sequence[int]]
    passed_on: tuple[str, ...]
    files: tuple[str, ...] = ()

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        models, methods, seeds = map(list, self.chosen)
        known = list(self.rows.methods)
        usual = " ".join(map(str, seeds))
        parser.add_argument("experiment", choices=[self.experiment])
        parser.add_argument(f"--{self.models_flag}", nargs="+", choices=self.models, default=models)
        parser.add_argument("--methods", nargs="+", default=methods, help=f"of {' '.join(known)}")
        parser.add_argument("--seeds", nargs="+", type=int, default=seeds, help=f"{usual} unless given")
        self.add_places(parser)

    def add_places(self, parser: argparse.ArgumentParser) -> None:
        """Add the options that say where data are, and what else is this campaign's own."""

    def scores(self, options: argparse.Namespace) -> tuple[str, ...]:
        """What the records must have scores by or of."""
        return ()

    def plan(self, options: argparse.Namespace, extra: Mapping[str, str]) -> list[RowTrial]:
        check_names("method", options.methods, list(self.rows.methods))
        more: dict[str, Any] = {"extra": real_flags(extra), "scores": self.scores(options), "rows": self.rows}
        return [
            RowTrial(f"{self.models[model]}/{method}", seed=seed, **more)
            for seed in options.seeds
            for model in getattr(options, self.models_flag)
            for method in options.methods
        ]

    def table(
        self,
        trials: Sequence[Any],
        found: Sequence[dict[str, Any]],
        options: argparse.Namespace,
        extra: Mapping[str, str],
    ) -> str | None:
        groups = self.grouped(trials, found)
        if not groups:
            return None
        if options.format == "csv":
            return tables.as_csv(*self.numbers(groups, options))
        header, lines, notes = self.lines(groups, options)
        return tables.render(header, lines, options.format, [*note_of(extra), *notes])

    def grouped(self, trials: Sequence[Any], found: Sequence[dict[str, Any]]) -> Groups:
        """The records that make one line of the table each, by what the line is called."""
        return records_of(trials, found)

    def numbers(self, groups: Groups, options: argparse.Namespace) -> tuple[Sequence[str], list[list[Any]]]:
        """The table as a header and rows of numbers, for CSV. (A campaign with a `table` of its own needs none.)"""
        raise NotImplementedError

    def lines(self, groups: Groups, options: argparse.Namespace) -> tuple[Sequence[str], tables.Lines, list[str]]:
        """The table as a header and lines of text, and the notes below. (A `table` of its own needs none.)"""
        raise NotImplementedError

    def model_folder(self, trial: Trial, options: argparse.Namespace) -> Path:
        """Of the trial's model in --models_dir."""
        return options.models_dir / self.rows.models[trial.model].name_or_path.rpartition("/")[2]

    def check_places(self, trials: Sequence[Any], options: argparse.Namespace) -> None:
        for flag in self.files if trials else ():
            place = getattr(options, flag)
            if place not in (None, "none") and not Path(place).is_file():
                raise ValueError(f"--{flag} {place}: no such file")
        for trial in trials if options.models_dir else ():
            if not (folder := self.model_folder(trial, options)).is_dir():
                raise ValueError(f"--models_dir {options.models_dir} has no folder {folder.name}")

    def job(self, trial: Any, options: argparse.Namespace, extra: Mapping[str, str]) -> schedule.Job:
        command = [sys.executable, str(self.script), "--row", trial.row, "--seed", str(trial.seed)]
        command += ["--output_dir", str(options.runs / trial.name)]
        for flag in self.passed_on:
            command += [f"--{flag}", str(getattr(options, flag))] if getattr(options, flag) else []
        command += ["--model_name_or_path", str(self.model_folder(trial, options))] if options.models_dir else []
        command += [part for flag, value in extra.items() for part in (f"--{flag}", value)]
        return schedule.Job(trial.name, command, options.runs / f"{trial.name}.log")


def records_of(trials: Sequence[Trial], found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records of the trials by row, in the trials' order; rows without any are left out.

    Raises:
        ValueError: the records of a row were made on different numbers of rows, and are not to be averaged.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if (record := next((r for r in found if trial.is_of(r)), None)) is not None:
            groups.setdefault(trial.row, []).append(record)
    for row, group in groups.items():
        sizes = {(record.get("train_rows"), record.get("held_out_rows")) for record in group}
        if len(sizes) > 1:
            raise ValueError(f"the records of {row} were made on different data ({sizes}): remove those not meant")
    return groups


def by_own_names(names: Iterable[str]) -> dict[str, str]:
    """Names that are the same on the command line and in the table of numbers."""
    return {name: name for name in names}


def note_of(extra: Mapping[str, str]) -> list[str]:
    """The note below a table whose runs were all given further flags."""
    return [f"With {' '.join(f'--{flag} {value}' for flag, value in extra.items())}."] if extra else []


def seeds_of(group: Sequence[Any]) -> str:
    """How many seeds, in words."""
    return f"{len(group)} seed{'s' if len(group) > 1 else ''}"


def run(campaign: Campaign, arguments: list[str]) -> None:
    """Do what the command line says: run what is missing, collect, print the table.

    Raises:
        ValueError: wrong options; or runs that failed, after the table of the others.
    """
    arguments, extra = cut(arguments, campaign.own_flags)
    options = parse(campaign, arguments)
    trials = campaign.plan(options, extra)
    found = records.read_files([*([options.runs] if options.runs.exists() else []), *options.records], campaign.kind)
    if options.watch or options.stop:
        attend(campaign, trials, options)
        return
    problem = ""
    if not options.no_runs:
        problem = run_missing(campaign, trials, found, options, extra)
        if options.plan:
            return
        found = records.read_files([options.runs, *options.records], campaign.kind)
    if options.collect:
        collect(campaign, trials, found, options.collect)
    text = campaign.table(trials, [record for _, record in found], options, extra)
    if text is not None:
        print(text)
        if options.output:
            with replacing(options.output) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
    elif not problem:
        places = ", ".join(map(str, [options.runs, *options.records]))
        problem = f"no record of {options.experiment} in {places}"
    if problem:
        raise ValueError(problem)


def parse(campaign: Campaign, arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        prog="reproduce.sh",
        description=sys.modules[type(campaign).__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    campaign.add_options(parser)
    parser.add_argument("--models_dir", type=Path, help="folder with the models' folders, not the hub")
    parser.add_argument("--jobs", type=int, help="processes at a time: all GPUs, or 1 on a CPU, unless given")
    parser.add_argument("--on", choices=(LOCAL, *follow.NAMES), default=LOCAL, help="where runs run (docs/cluster.md)")
    parser.add_argument("--cluster", type=Path, help="file with what each run asks the cluster for, .yaml or .json")
    parser.add_argument("--watch", action="store_true", help="show what the runs are doing, until they have ended")
    parser.add_argument("--stop", action="store_true", help="end the runs of this folder on the cluster")
    parser.add_argument("--runs", type=Path, default=campaign.runs, help="where runs are kept")
    parser.add_argument("--records", nargs="+", type=Path, default=[], help="further folders with finished records")
    parser.add_argument("--collect", type=Path, help="copy the records, and what else is kept, into this folder")
    parser.add_argument("--plan", action="store_true", help="show the runs and stop")
    parser.add_argument("--no_runs", action="store_true", help="the table of what has been run")
    parser.add_argument("--format", choices=tables.FORMATS, default="markdown")
    parser.add_argument("--output", type=Path, help="write the table to this file too")
    options = commands.one_line_errors(parser).parse_args(arguments)
    for name in campaign.filters:
        if (values := getattr(options, name)) is not None:
            setattr(options, name, list(dict.fromkeys(values)))  # nothing twice
    if sum((options.plan, options.no_runs, options.watch, options.stop)) > 1:
        raise ValueError("--plan, --no_runs, --watch and --stop exclude each other")
    for flag, value in (("jobs", options.jobs), ("cluster", options.cluster), ("stop", options.stop or None)):
        if value is not None and (options.on == LOCAL) != (flag == "jobs"):
            raise ValueError(f"--{flag} does nothing with --on {options.on}: leave it out")
    options.settings = settings.read(options.cluster, options.on)
    for name in campaign.folders:
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{name} {folder}: no such folder")
    return options


def run_missing(
    campaign: Campaign,
    trials: Sequence[Trial],
    found: Sequence[Found],
    options: argparse.Namespace,
    extra: Mapping[str, str],
) -> str:
    """Show the plan, and run what has no record, unless --plan: what went wrong in a line, or "".

    Raises:
        ValueError: a run cannot start.
    """
    missing = [t for t in trials if not any(t.is_of(record) for _, record in found)]
    starts, missing_starts = campaign.starts(missing, options)
    to_do = [*missing_starts, *missing]
    campaign.check_places(to_do, options)
    slots = schedule.devices(options.jobs) if options.on == LOCAL else []
    jobs, cluster = prepared(campaign, to_do, options, extra)
    say = print if options.plan else schedule.say_progress  # a plan is what was asked for
    if title := campaign.title(options):
        say(title)
    known = [record for _, record in found]
    say(describe(campaign, len(trials) + len(starts), to_do, known, len(slots)))
    if options.plan:
        return ""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)
    if cluster is None:
        with board.Board(len(jobs)) as shown:
            failed = schedule.run_all(jobs, [{**slot, **shown.environment} for slot in slots], shown.say, shown.look)
    else:
        if fault := shared_locks.fault(options.runs):
            schedule.say_progress(fault)
        failed = follow.run_all(cluster, jobs)
    options.runs.mkdir(parents=True, exist_ok=True)
    if not failed:
        return ""
    return (
        f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; their logs are beside their folders in "
        f"{options.runs}, and the table is of the others"
    )


def prepared(
    campaign: Campaign, to_do: Sequence[Trial], options: argparse.Namespace, extra: Mapping[str, str]
) -> tuple[list[schedule.Job], follow.Cluster | None]:
    """The jobs of these runs, and what they run on, as `opened`: whatever would be refused is refused here."""
    jobs = [campaign.job(t, options, extra) for t in to_do]
    if options.plan and not extra:  # the rows alone, for which nobody has to wait for transformers
        return jobs, None
    if options.on != LOCAL:
        refuse_secrets(jobs)
    cluster = opened(options) if to_do and not options.plan else None
    # A mistake in the flags would fail in every process: look at one run of each row and variant before.
    for job in {(t.row, t.variant): j for t, j in zip(to_do, jobs, strict=True) if not j.after}.values():
        campaign.check_flags(job.command[2:])
    return jobs, cluster


def opened(options: argparse.Namespace) -> follow.Cluster | None:
    """The cluster that runs run on; None for this machine."""
    return None if options.on == LOCAL else follow.opened(options.on, options.runs, options.settings)


def refuse_secrets(jobs: Sequence[schedule.Job]) -> None:
    """Raise ValueError for a secret in a command: a cluster keeps commands in files."""
    for job in jobs:
        if secret := next((part for part in job.command if part.startswith("--") and is_secret(part)), None):
            raise ValueError(f"{secret} would stand in files of the cluster: give it in the environment of its workers")


def attend(campaign: Campaign, trials: Sequence[Trial], options: argparse.Namespace) -> None:
    """Show what the runs are doing, until they have ended (--watch); or end them (--stop)."""
    cluster = opened(options)
    if options.stop and cluster is not None:
        ended = cluster.queued()
        cluster.stop()
        schedule.say_progress(f"{len(ended)} runs ended; the same command without --stop goes on with them")
        return

    def look() -> list[watch.Seen]:
        places = [*([options.runs] if options.runs.exists() else []), *options.records]
        found = [record for _, record in records.read_files(places, campaign.kind)]
        queued = {} if cluster is None else cluster.queued()
        seen = []
        for trial in [*campaign.starts(trials, options)[0], *trials]:
            record = next((record for record in found if trial.is_of(record)), None)
            minutes, _ = campaign.estimate(trial, found)
            seen.append(watch.see(trial.name, options.runs, record, queued.get(trial.name), minutes))
        return seen

    watch.watch(look)


def describe(
    campaign: Campaign, count: int, missing: Sequence[Trial], found: Sequence[dict[str, Any]], slots: int
) -> str:
    """The plan for reading: of `count` runs those that are missing, how long each may take, and all together.

    Of a cluster it is not known how many run at a time: `slots` is 0 then.
    """
    at_a_time = f", {slots} at a time" if slots else ""
    lines = [f"{count} runs, of which {len(missing)} are to be done{at_a_time}:"]
    total, unknown = 0.0, 0
    for trial in missing:
        minutes, source = campaign.estimate(trial, found)
        total += minutes or 0
        unknown += minutes is None
        length = "     ? min" if minutes is None else f"{minutes:6.0f} min ({source})"
        lines.append(f"  {trial.name:<56} {length}")
    if missing:
        guess = f" and {unknown} of unknown length" if unknown else ""
        known = f"together {total / 60:.1f} hours{guess}"
        known += f", over {slots}: {total / 60 / slots:.1f} hours" if slots else ""
        lines.append(known if unknown < len(missing) else "how long they take is not known")
    return "\n".join(lines)


def collect(campaign: Campaign, trials: Sequence[Trial], found: Sequence[Found], folder: Path) -> None:
    """Copy every record of these trials, and what else the campaign keeps, into a folder."""
    for trial in trials:
        one = next(((path, record) for path, record in found if trial.is_of(record)), None)
        if one is not None:
            path, record = one
            write_json(folder / f"{trial.name}.json", record)
            campaign.keep(trial, path, folder)


def cut(arguments: list[str], own: frozenset[str]) -> tuple[list[str], dict[str, str]]:
    """The script's own arguments, and the flags after "--".

    Raises:
        ValueError: a flag without a value, or one that would undo the plan.
    """
    if "--" not in arguments:
        return arguments, {}
    at = arguments.index("--")
    rest = split(arguments[at + 1 :])
    if len(rest) % 2 or not all(flag.startswith("--") for flag in rest[::2]):
        raise ValueError(f'after "--" come flags with one value each, such as --bf16 true, not {" ".join(rest)}')
    names = [flag.removeprefix("--").replace("-", "_") for flag in rest[::2]]
    if undone := [name for name in names if name in own]:
        raise ValueError(f'--{undone[0]} after "--" would undo the plan: use the options before it (--help)')
    return arguments[:at], dict(zip(names, rest[1::2], strict=True))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
