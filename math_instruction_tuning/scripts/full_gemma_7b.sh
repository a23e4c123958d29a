#!/usr/bin/env bash
# Table 4: Gemma-7B, full fine-tuning.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" gemma_7b/full "$@"
