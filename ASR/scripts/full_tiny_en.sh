#!/usr/bin/env bash
# Whisper tiny.en, full fine-tuning; --language and --data_dir name the recordings.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" tiny_en/full "$@"
