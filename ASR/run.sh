#!/usr/bin/env bash
# Runs one row of asr_rows.py: run.sh MODEL/METHOD --language it --data_dir DIR [flags of run_asr.py]; SEED=n: the seed.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
row="${1:?usage: run.sh MODEL/METHOD [flags of run_asr.py]}"
shift
exec "$here/../scripts/in_environment.sh" "$here/run_asr.py" --row "$row" --seed "${SEED:-0}" "$@"
