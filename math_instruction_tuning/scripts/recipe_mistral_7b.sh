#!/usr/bin/env bash
# Table 4's data: Mistral-7B, VB-LoRA by the recipe, which is no row of the paper.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" mistral_7b/recipe "$@"
