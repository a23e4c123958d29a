#!/usr/bin/env bash
# Table 3: Llama2-7B, LoRA-XS.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llama2_7b/lora_xs "$@"
