#!/usr/bin/env bash
# Runs one row of Table 7: run.sh MODEL TASK TARGETS [flags of run_glue.py]; SEED=n chooses the seed.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
row="$1/$2/$3"
shift 3
python="$here/../.venv/bin/python"
[ -x "$python" ] || python=python
exec "$python" "$here/run_glue.py" --row "$row" --seed "${SEED:-0}" "$@"
