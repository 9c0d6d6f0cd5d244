#!/usr/bin/env bash
# Train on this machine with NPROC processes: one per GPU, or a few on the CPU.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ || ($2 == *=* && ! -f $2) ]]; then
  echo "usage: scripts/torchrun_local.sh NPROC RUN.yaml [section.key=value ...]" >&2
  exit 2
fi
processes=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Each process gets its share of the cores; without this each would start a thread per core.
share=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
# torch prints the stack of each C++ warning: 25 lines if a process leaves before the others.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# The launcher of this checkout, also if the package is not installed.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# --standalone: a rendezvous on a free port, so that several runs can share the machine.
exec "${PYTHON:-python}" -m jetmoe_megatron.launch.elastic \
  --standalone --nproc-per-node "$processes" "$root/pretrain_jetmoe.py" "$@"
