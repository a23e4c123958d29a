#!/usr/bin/env bash
# Sets up .venv, then checks style, types and tests: ./scripts/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh dev
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One thread for each of the two test processes: more would only fight over the cores.
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports --no-logo --no-cache
.venv/bin/python -m pytest -n 2 "$@"
