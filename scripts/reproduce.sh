#!/usr/bin/env bash
# One table of the paper: ./scripts/reproduce.sh table1 [--sizes base large] [--plan] ...; TABLE --help says more.
# With --on slurm or --on ray the runs run on a cluster (docs/cluster.md).
# table1, table5, table6 and the searches beside them are GLUE's; table2 is E2E's, table3 MT-Bench's, table4 mathematics', asr speech's.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export TOKENIZERS_PARALLELISM=false
case "${1:-}" in
    asr) script=ASR/reproduce_asr.py ;;
    recipe) script=NLU/recipe_study.py ;;
    many) script=NLU/many_tasks.py ;;
    field) script=NLU/field_study.py ;;
    table2) script=NLG/reproduce_e2e.py ;;
    table3) script=instruction_tuning/reproduce_instruct.py ;;
    table4) script=math_instruction_tuning/reproduce_math.py ;;
    table1 | table5 | table6 | init_std | bank_size | shared_bank | learning_rates | -*) script=NLU/reproduce.py ;;
    *)
        echo "reproduce.sh: error: no table '${1:-}': it is table1 to table6, asr, recipe, field, many, or a search beside" \
            "table1: init_std, bank_size, shared_bank, learning_rates" >&2
        exit 2
        ;;
esac
"$here/scripts/setup.sh"
exec "$here/.venv/bin/python" "$here/$script" "$@"
