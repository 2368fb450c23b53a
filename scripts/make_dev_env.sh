#!/usr/bin/env bash
# make_dev_env.sh DIR EXTRAS TORCH: a virtual environment with this project installed in
# place. Run again, it only adds what is missing. `make install` calls it.
set -euo pipefail

env=$1 extras=$2 torch=$3
if [ ! -x "$env/bin/python" ] && ! "$PYTHON" -m venv "$env"; then
    echo "On Debian: apt-get install python3.11-venv" >&2
    exit 1
fi
"$env/bin/python" - <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
PY
pip=("$env/bin/python" -m pip install --progress-bar off --no-compile)
"${pip[@]}" --upgrade pip
"${pip[@]}" "$torch" --editable ".[$extras]"
touch "$env/.ready"
