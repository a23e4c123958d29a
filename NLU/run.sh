#!/usr/bin/env bash
# Runs one row of hyperparameters.py: run.sh MODEL/TASK/METHOD [flags of run_glue.py]; SEED=n chooses the seed.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
row="${1:?usage: run.sh MODEL/TASK/METHOD [flags of run_glue.py]}"
shift
exec "$here/../scripts/in_environment.sh" "$here/run_glue.py" --row "$row" --seed "${SEED:-0}" "$@"
