#!/usr/bin/env bash
# Table 3's data: Llama2-13B, VB-LoRA by the recipe, which is no row of the paper.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llama2_13b/recipe "$@"
