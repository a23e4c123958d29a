"""Put the tables that records give into the documents: python scripts/fill_tables.py README.md docs/*.md

A table stands between two comments, the first of which says what makes it:

    <!-- made by: reproduce.sh table1 --sizes minilm --records results/glue_minilm -->
    <!-- end -->

or python and a script that prints nothing but a table.

The tests hold every such table to the records.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "table2": "NLG/reproduce_e2e.py",
    "table3": "instruction_tuning/reproduce_instruct.py",
    "table4": "math_instruction_tuning/reproduce_math.py",
}
TABLE = re.compile(r"(<!-- made by: (reproduce\.sh|python) ([^>]*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def printed_by(program: str, arguments: list[str]) -> str:
    """What reproduce.sh prints for these arguments, from records alone; or what Python does."""
    if program == "python":
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    script = ROOT / SCRIPTS.get(arguments[0], "NLU/reproduce.py")
    with tempfile.TemporaryDirectory() as nothing:
        command = [sys.executable, str(script), arguments[0], "--no_runs", "--runs", nothing, *arguments[1:]]
        return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def filled(text: str) -> str:
    """The text with each table made anew."""
    return TABLE.sub(lambda found: f"{found[1]}\n{printed_by(found[2], found[3].split())}\n\n{found[5]}", text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        path.write_text(after, encoding="utf-8")
        print(f"{path}: {'changed' if after != before else 'as it was'}")
