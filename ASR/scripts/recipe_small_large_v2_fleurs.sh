#!/usr/bin/env bash
# Whisper large-v2 on a language of FLEURS, VB-LoRA by the recipe, with a twentieth of LoRA's numbers; --language and --data_dir name the recordings.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" large_v2_fleurs/recipe_small "$@"
