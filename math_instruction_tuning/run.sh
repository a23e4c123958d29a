#!/usr/bin/env bash
# Runs one row of math_rows.py: run.sh MODEL/METHOD [flags of run_math.py]; SEED=n chooses the seed.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
row="${1:?usage: run.sh MODEL/METHOD [flags of run_math.py]}"
shift
exec "$here/../scripts/in_environment.sh" "$here/run_math.py" --row "$row" --seed "${SEED:-0}" "$@"
