#!/usr/bin/env bash
# Whisper tiny.en, as it is; --language and --data_dir name the recordings.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" tiny_en/zero_shot "$@"
