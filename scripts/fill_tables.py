"""Put the tables that records give into the documents: python scripts/fill_tables.py README.md docs/*.md

A table stands between two comments, the first of which says what makes it:

    <!-- made by: reproduce.sh table1 --sizes minilm --records results/glue_minilm -->
    <!-- end -->

or python and a script that prints nothing but a table.

The tests hold every such table to the records.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "asr": "ASR/reproduce_asr.py",
    "recipe": "NLU/recipe_study.py",
    "field": "NLU/field_study.py",
    "many": "NLU/many_tasks.py",
    "table2": "NLG/reproduce_e2e.py",
    "table3": "instruction_tuning/reproduce_instruct.py",
    "table4": "math_instruction_tuning/reproduce_math.py",
}
TABLE = re.compile(r"(<!-- made by: (reproduce\.sh|python) ([^>]*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def command_of(program: str, arguments: list[str], nothing: str) -> tuple[str, ...]:
    """The script and its arguments: of reproduce.sh, which makes tables from records alone here, or of Python."""
    if program == "python":
        return (str(ROOT / arguments[0]), *arguments[1:])
    script = str(ROOT / SCRIPTS.get(arguments[0], "NLU/reproduce.py"))
    return (script, arguments[0], "--no_runs", "--runs", nothing, *arguments[1:])


def printed(command: tuple[str, ...]) -> str:
    """What a command prints. It runs in this process, as most of the time goes into importing the same modules."""
    script = command[0]
    kept = sys.argv, sys.path
    sys.argv, sys.path = list(command), [str(Path(script).parent), *sys.path]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(command)} ended with {end.code}") from None
    finally:
        sys.argv, sys.path = kept
    return text.getvalue()


def filled(text: str) -> str:
    """The text with each table made anew."""
    with tempfile.TemporaryDirectory() as nothing:

        def table(found: re.Match[str]) -> str:
            return f"{found[1]}\n{printed(command_of(found[2], found[3].split(), nothing)).strip()}\n\n{found[5]}"

        return TABLE.sub(table, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        path.write_text(after, encoding="utf-8")
        print(f"{path}: {'changed' if after != before else 'as it was'}")
