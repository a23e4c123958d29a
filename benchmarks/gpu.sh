#!/usr/bin/env bash
# Everything that needs a GPU, in calls that each end within nine minutes, on a machine that can download nothing.
#   benchmarks/gpu.sh --rehearse        here, on the CPU: the same, tiny, with what is generated
#   benchmarks/gpu.sh --pack KIT ...    here: data, weights in 16 bits and packages into the folder KIT (--help)
#   benchmarks/gpu.sh --kit KIT         there, again and again, until it ends with 0: 3 says that there is more to do
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# What a machine with PyTorch, transformers, peft, accelerate and scikit-learn may lack; none of their needs comes along.
# (pycocoevalcap, 104 MB, and Java give METEOR and CIDEr; without them NLG/score.py scores the kept texts afterwards.)
export VBLORA_WHEELS="${VBLORA_WHEELS:-bitsandbytes==0.50.2 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 \
nltk==3.10.4 rouge-score==0.1.2 sacrebleu==2.6.0}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
python="$root/.venv/bin/python"
if [ ! -x "$python" ]; then python=python3; fi
exec "$python" "$root/benchmarks/gpu.py" "$@"
