#!/usr/bin/env bash
# Whisper base, as it is; --language and --data_dir name the recordings.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" base/zero_shot "$@"
