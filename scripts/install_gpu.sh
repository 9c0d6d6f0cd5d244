#!/usr/bin/env bash
# Install what a GPU needs, with versions that work together: docs/install.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
usage: scripts/install_gpu.sh [--te] [--megablocks] [--all] [--pinned] [--wheels FOLDER] [--dry-run]

Installs jetmoe-megatron into the environment of $PYTHON (default: python3). An installed torch is not changed.
  --te            Transformer Engine: fused attention for context parallelism, FusedAdam, expert_backend te and te_fp8
  --megablocks    MegaBlocks and its grouped matmul: expert_backend megablocks
  --all           both
  --pinned        the versions of constraints.txt for all packages that are not installed yet
  --wheels FOLDER install from the wheels in a folder, without a network
  --dry-run       print the commands and run none
TEXT
}

te=false megablocks=false pinned=false dry_run=false wheels=""
while [[ $# -gt 0 ]]; do
  case $1 in
    --te) te=true ;;
    --megablocks) megablocks=true ;;
    --all) te=true megablocks=true ;;
    --pinned) pinned=true ;;
    --wheels)
      wheels=${2:-}
      if [[ ! -d $wheels ]]; then
        echo "error: --wheels: ${wheels:-nothing} is not a folder" >&2
        exit 2
      fi
      shift
      ;;
    --dry-run) dry_run=true ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  shift
done
if [[ -n $wheels ]]; then
  wheels=$(cd "$wheels" && pwd)
fi

python=${PYTHON:-python3}
run() {
  printf '+%s\n' "$(printf ' %q' "$@")"
  if [[ $dry_run == false ]]; then
    "$@"
  fi
}
pip() {
  if [[ -n $wheels ]]; then
    run "$python" -m pip install --no-index --find-links "$wheels" "$@"
  else
    run "$python" -m pip install "$@"
  fi
}
# Torch's version and CUDA, the GPU's architecture (Hopper's if there is none), and whether the packages work.
facts() {
  "$python" -W ignore -c '
import importlib, importlib.metadata, torch

def works(*names):
    try:
        return [importlib.import_module(name) for name in names] and 1
    except (ImportError, OSError):
        return 0

capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
print(importlib.metadata.version("torch"), (torch.version.cuda or "none").split(".")[0], "%d.%d" % capability,
      works("transformer_engine.pytorch"), works("grouped_gemm", "megablocks.ops"))' 2> /dev/null
}

if ! "$python" -c 'import importlib.util as u; raise SystemExit(u.find_spec("torch") is None)'; then
  pip 'torch==2.11.0' # its wheel on the package index is the one for CUDA 13
fi
read -r torch cuda arch has_te has_megablocks < <(facts || echo "2.11.0 13 9.0 0 0")
if ! allowed=$("$python" -c '
import pathlib, re, sys
from pip._vendor.packaging.requirements import Requirement

needed = re.search("\"(torch[<>=][^\"]*)\"", pathlib.Path("setup.py").read_text())[1]
print(needed)
raise SystemExit(not Requirement(needed).specifier.contains(sys.argv[1], prereleases=True))' "$torch"); then
  echo "error: torch $torch is installed, but jetmoe-megatron needs $allowed: use an environment or a container with" \
    "such a torch" >&2
  exit 2
fi
# pip must not replace a container's torch and Transformer Engine.
held=$(mktemp)
trap 'rm -rf "$held" "${source:-}"' EXIT
echo "torch==$torch" > "$held"
"$python" -c '
import importlib.metadata

try:
    print("transformer-engine==" + importlib.metadata.version("transformer_engine"))
except importlib.metadata.PackageNotFoundError:
    pass' >> "$held"
if $pinned; then
  "$python" -c '
import importlib.metadata, pathlib, re

for line in pathlib.Path("constraints.txt").read_text().splitlines():
    try:
        importlib.metadata.version(re.match(r"[\w.-]+", line)[0])
    except importlib.metadata.PackageNotFoundError:
        print(line)' >> "$held"
fi
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}
pip setuptools wheel
pip -c "$held" --no-build-isolation .

# Building from source needs the compiler of the CUDA version that torch was built for.
if [[ -z $wheels && $dry_run == false ]] && { $te || $megablocks; }; then
  nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
  if [[ $cuda == none ]]; then
    echo "error: this torch is built without CUDA: install one with CUDA, or set PYTHON to a Python that has one" >&2
    exit 2
  fi
  if ! "$nvcc" --version 2> /dev/null | grep -q "release $cuda\."; then
    echo "error: building needs nvcc of CUDA $cuda: install the toolkit and set CUDA_HOME to its folder" >&2
    exit 2
  fi
fi

if $te && [[ $has_te == 0 ]]; then
  # Its torch part is built from source, against the installed torch, so the build must not be isolated. It needs the
  # headers of cuDNN and NCCL. The CUDA toolkit does not have them, but the packages that torch came with do.
  headers=$("$python" -c '
import importlib.util, pathlib

spec = importlib.util.find_spec("nvidia")
found = [path for root in (spec.submodule_search_locations if spec else []) for path in pathlib.Path(root).glob("*/include")]
print(*sorted(found), sep=":")')
  if [[ -n $headers ]]; then
    run export "CPATH=$headers${CPATH:+:$CPATH}"
  fi
  NVTE_FRAMEWORK=pytorch pip -c "$held" --no-build-isolation '.[gpu]' pybind11 ninja
fi

if $megablocks && [[ $has_megablocks == 0 ]]; then
  pip 'stanford-stk==0.7.1'
  # --no-deps: MegaBlocks pins torch 2.7 and a `packaging` that Megatron-Core does not accept.
  # --no-build-isolation: an isolated build would use torch 2.7.
  # --no-cache-dir: after one build without CUDA, pip would always take that wheel, without the extension.
  options=(--no-deps --no-build-isolation --no-cache-dir)
  if [[ -n $wheels ]]; then
    pip "${options[@]}" 'grouped_gemm==0.3.0' 'megablocks==0.10.0'
  else
    pip "${options[@]}" 'grouped_gemm==0.3.0'
    source=$(mktemp -d)
    run "$python" -m pip download "${options[@]}" --no-binary :all: --dest "$source" 'megablocks==0.10.0'
    run tar -xzf "$source/megablocks-0.10.0.tar.gz" -C "$source"
    # CUDA 13 dropped the last argument of these two calls of CUB.
    run sed -i -z -E 's/stream,[[:space:]]+debug_synchronous\)/stream)/g' "$source/megablocks-0.10.0/csrc/cumsum.h"
    pip "${options[@]}" "$source/megablocks-0.10.0"
  fi
fi

# NVIDIA's Apex is used if it is installed, as in NVIDIA's containers. The package index has a different `apex`.
# Status 5: something does not work here. What is installed stays, so that it can be mended.
run "$python" -m jetmoe_megatron.cli doctor || [[ $? == 5 ]]
