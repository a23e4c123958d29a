#!/usr/bin/env bash
# One HTML page from records: ./scripts/report.sh [FOLDER...] [--output FILE.html]; --help says more.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$here/scripts/setup.sh"
exec "$here/.venv/bin/python" "$here/scripts/report.py" "$@"
