#!/usr/bin/env bash
# Runs one row of e2e_rows.py: run.sh MODEL/METHOD [flags of run_e2e.py]; SEED=n chooses the seed.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
row="${1:?usage: run.sh MODEL/METHOD [flags of run_e2e.py]}"
shift
python="$here/../.venv/bin/python"
if [ ! -x "$python" ]; then
    python=python
    if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("transformers") is None)' 2>/dev/null; then
        echo "run.sh: error: no .venv and no transformers in this environment: run scripts/setup.sh first" >&2
        exit 2
    fi
fi
exec "$python" "$here/run_e2e.py" --row "$row" --seed "${SEED:-0}" "$@"
