#!/usr/bin/env bash
# Whisper base, LoRA; --language and --data_dir name the recordings.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" base/lora "$@"
