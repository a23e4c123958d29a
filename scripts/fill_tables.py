"""Put the tables that records give into the documents: python scripts/fill_tables.py README.md docs/*.md

A table stands between two comments, the first of which says what makes it:

    <!-- made by: reproduce.sh table1 --sizes minilm --records results/glue_minilm -->
    <!-- end -->

or python and a script that prints nothing but a table.

The tests hold every such table to the records.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "asr": "ASR/reproduce_asr.py",
    "recipe": "NLU/recipe_study.py",
    "field": "NLU/field_study.py",
    "table2": "NLG/reproduce_e2e.py",
    "table3": "instruction_tuning/reproduce_instruct.py",
    "table4": "math_instruction_tuning/reproduce_math.py",
}
TABLE = re.compile(r"(<!-- made by: (reproduce\.sh|python) ([^>]*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


# Runs commands of one folder in one process, as most of the time goes into importing the same modules.
RUNNER = """
import contextlib, io, json, runpy, sys
texts = []
for script, *arguments in json.load(sys.stdin):
    sys.argv = [script, *arguments]
    sys.path[0] = script.rpartition("/")[0]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                sys.exit(f"{script} {arguments}: {end.code}")
    texts.append(printed.getvalue())
json.dump(texts, sys.stdout)
"""


def command_of(program: str, arguments: list[str], nothing: str) -> tuple[str, ...]:
    """The script and its arguments: of reproduce.sh, which makes tables from records alone here, or of Python."""
    if program == "python":
        return (str(ROOT / arguments[0]), *arguments[1:])
    script = str(ROOT / SCRIPTS.get(arguments[0], "NLU/reproduce.py"))
    return (script, arguments[0], "--no_runs", "--runs", nothing, *arguments[1:])


def printed(commands: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """What each command prints."""
    texts = {}
    folder_of = {command: command[0].rpartition("/")[0] for command in commands}
    for folder in set(folder_of.values()):
        own = [command for command in folder_of if folder_of[command] == folder]
        process = subprocess.run(
            [sys.executable, "-c", RUNNER],
            input=json.dumps(own),
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        texts |= dict(zip(own, json.loads(process.stdout.splitlines()[-1]), strict=True))
    return texts


def filled(text: str) -> str:
    """The text with each table made anew."""
    with tempfile.TemporaryDirectory() as nothing:
        commands = [command_of(found[2], found[3].split(), nothing) for found in TABLE.finditer(text)]
        texts = printed(commands)
    tables = iter(texts[command].strip() for command in commands)
    return TABLE.sub(lambda found: f"{found[1]}\n{next(tables)}\n\n{found[5]}", text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        path.write_text(after, encoding="utf-8")
        print(f"{path}: {'changed' if after != before else 'as it was'}")
