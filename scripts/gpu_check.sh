#!/usr/bin/env bash
# Everything that one GPU can tell, within ten minutes: the packages, the tests that need a GPU, the benchmark.
# usage: scripts/gpu_check.sh [FOLDER]    leaves packages.txt, tests.txt and gpu_step.md in FOLDER (default: gpu_check)
set -uo pipefail
if [[ ${1:-} == -* || $# -gt 1 ]]; then
  sed -n 's/^# usage: /usage: /p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
folder=${1:-gpu_check}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
status=0

timeout 60 "$python" scripts/gpu_packages.py 2>&1 | tee "$folder/packages.txt" || status=1
timeout 240 "$python" -m pytest tests/gpu -q 2>&1 | tee "$folder/tests.txt" || status=1
timeout 290 "$python" benchmarks/gpu_step.py --minutes 4.5 > "$folder/gpu_step.md" || status=1
cat "$folder/gpu_step.md"
exit $status
