#!/usr/bin/env bash
# Table 3: Llama2-13B, LoRA-XS.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" llama2_13b/lora_xs "$@"
