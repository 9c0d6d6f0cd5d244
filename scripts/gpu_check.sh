#!/usr/bin/env bash
# Check one GPU within ten minutes: jetmoe doctor, the tests that need a GPU, the benchmark of the step.
# benchmarks.loss_curves needs another ten minutes, so it is not part of this.
# usage: scripts/gpu_check.sh [FOLDER]    leaves doctor.txt, tests.txt and gpu_step.md in FOLDER (default: gpu_check)
# $PYTHON is the Python to use; $COMMIT names the commit where git cannot.
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
failed=()

# -v prints each test by name, so that the log shows which ones finished in time.
timeout 50 "$python" -m jetmoe_megatron.cli doctor 2>&1 | tee "$folder/doctor.txt" || failed+=(doctor)
timeout 230 "$python" -m pytest tests/gpu -v -rs 2>&1 | tee "$folder/tests.txt" || failed+=(tests)
timeout 280 "$python" -m benchmarks.gpu_step --minutes 4.4 > "$folder/gpu_step.md" || failed+=(gpu_step)
cat "$folder/gpu_step.md"

if [[ ${#failed[@]} -gt 0 ]]; then
  echo "gpu_check: FAILED: ${failed[*]}; all output is in $folder"
  exit 1
elif ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "gpu_check: there is no GPU that torch can use: the code ran, nothing was measured"
else
  skipped=$(grep -c ' SKIPPED' "$folder/tests.txt" || true)
  echo "gpu_check: passed, ${skipped} tests skipped (tests.txt says why); all output is in $folder"
fi
