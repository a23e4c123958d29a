#!/usr/bin/env bash
# Runs a Python script in .venv or, where there is none, in the environment that is active: in_environment.sh SCRIPT ...
set -euo pipefail
python="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python"
if [ ! -x "$python" ]; then
    python=python
    if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("transformers") is None)' 2>/dev/null; then
        echo "run.sh: error: no .venv and no transformers in this environment: run scripts/setup.sh first" >&2
        exit 2
    fi
fi
exec "$python" "$@"
