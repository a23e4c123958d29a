#!/usr/bin/env bash
# Table 2: GPT-2 Large, VB-LoRA, with the values of Table 8.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" gpt2_large/vblora "$@"
