"""How a script of this project starts and ends: wrong input is one line and exit code 2."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

# bitsandbytes asks at its import for a package that nothing here needs. (A script that imports transformers' models or
# peft before this module has printed that line by now.)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

Parser = TypeVar("Parser", bound=argparse.ArgumentParser)


def run(main: Callable[[list[str]], Any], name: str) -> None:
    """Run a script's main function on the command line; wrong input is one line and exit code 2."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def one_line_errors(parser: Parser) -> Parser:
    """The parser, which raises ValueError where argparse would print some hundred lines of usage and exit."""

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser.error = refuse  # type: ignore[method-assign]
    return parser
