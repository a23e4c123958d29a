#!/usr/bin/env bash
# Whisper tiny.en, VB-LoRA with the rates of its paper; --language and --data_dir name the recordings.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" tiny_en/vblora "$@"
