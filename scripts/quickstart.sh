#!/usr/bin/env bash
# Sets up .venv, then fine-tunes a small encoder with VB-LoRA and with LoRA, and shows both: ./scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python NLU/quickstart.py "$@"
