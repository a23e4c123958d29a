"""How a script of this project starts and ends: wrong input is one line and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from vblora_experiments.secrets import masked

# bitsandbytes asks at its import for a package that nothing here needs. A script imports this module before those that
# import it, transformers and peft.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

Parser = TypeVar("Parser", bound=argparse.ArgumentParser)
Options = TypeVar("Options")


def run(main: Callable[[list[str]], Any], name: str) -> None:
    """Run a script's main function on the command line; wrong input is one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"{name}: error: {masked(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)


def one_line_errors(parser: Parser) -> Parser:
    """The parser, which raises ValueError where argparse would print some hundred lines of usage and exit."""

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser.error = refuse  # type: ignore[method-assign]
    return parser


def parsed(parser: argparse.ArgumentParser, kind: type[Options], arguments: list[str]) -> Options:
    """The arguments as an object of a dataclass, whose defaults are also the parser's."""
    parser.set_defaults(**{f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING})  # type: ignore[arg-type]
    known = vars(parser.parse_args(arguments))
    return kind(**{f.name: known[f.name] for f in dataclasses.fields(kind) if f.name in known})  # type: ignore[arg-type]


def check_least(options: Any, **least: float) -> None:
    """Refuse an option below the least that it may be; one that is None is not given.

    Raises:
        ValueError: naming the first of them.
    """
    for name, bound in least.items():
        if (value := getattr(options, name)) is not None and not value >= bound:
            raise ValueError(f"--{name} must be at least {bound}, not {value}")


def check_kept_records(options: argparse.Namespace) -> None:
    """Of a study's command: --records and --no_runs print the table of kept records, from folders that are there.

    Raises:
        ValueError: one without the other, a folder that does not exist, or a flag for runs beside them.
    """
    if options.no_runs != (options.records is not None):
        raise ValueError("--records FOLDER and --no_runs go together: the table of kept records")
    if not options.no_runs:
        return
    folders = options.records if isinstance(options.records, list) else [options.records]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ValueError(f"--records {missing[0]} is no folder")
    if options.collect is not None:
        raise ValueError("--collect copies the records of runs, and with --no_runs there are none")
