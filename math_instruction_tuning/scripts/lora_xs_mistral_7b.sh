#!/usr/bin/env bash
# Table 4: Mistral-7B, LoRA-XS.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" mistral_7b/lora_xs "$@"
