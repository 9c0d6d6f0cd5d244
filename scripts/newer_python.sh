#!/usr/bin/env bash
# Print a Python that the newer Megatron-Core supports (setup.py): $PYTHON312 if it is set, else the first that runs here.
set -euo pipefail
candidates=(python3.12 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python)
if [ -n "${PYTHON312:-}" ]; then
    candidates=("$PYTHON312")
fi
for python in "${candidates[@]}"; do
    if "$python" -c 'import ensurepip, sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' 2> /dev/null; then
        echo "$python"
        exit 0
    fi
done
echo "error: no Python 3.12 or 3.13 runs here (tried ${candidates[*]}): set PYTHON312 to the path of one" >&2
exit 2
