#!/usr/bin/env bash
# Whisper large-v2 on a language of FLEURS, as it is; --language and --data_dir name the recordings.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" large_v2_fleurs/zero_shot "$@"
