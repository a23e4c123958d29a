#!/usr/bin/env bash
# Runs one row of e2e_rows.py: run.sh MODEL/METHOD [flags of run_e2e.py]; SEED=n chooses the seed.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
row="${1:?usage: run.sh MODEL/METHOD [flags of run_e2e.py]}"
shift
exec "$here/../scripts/in_environment.sh" "$here/run_e2e.py" --row "$row" --seed "${SEED:-0}" "$@"
