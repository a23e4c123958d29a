#!/usr/bin/env bash
# Table 2: GPT-2 Large, LoRA.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" gpt2_large/lora "$@"
