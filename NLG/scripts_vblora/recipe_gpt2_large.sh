#!/usr/bin/env bash
# Table 2's data: GPT-2 Large, VB-LoRA by the recipe, which is no row of the paper.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" gpt2_large/recipe "$@"
