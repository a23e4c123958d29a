#!/usr/bin/env bash
# Whisper base, VB-LoRA by the recipe, with a twentieth of LoRA's numbers; --language and --data_dir name the recordings.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" base/recipe_small "$@"
