#!/usr/bin/env bash
# Table 4: Mistral-7B, full fine-tuning.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" mistral_7b/full "$@"
