#!/usr/bin/env bash
# Table 4's data: Gemma-7B, VB-LoRA by the recipe, which is no row of the paper.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" gemma_7b/recipe "$@"
