#!/usr/bin/env bash
# Table 3's data: Llama2-7B, VB-LoRA by the recipe, which is no row of the paper.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llama2_7b/recipe "$@"
