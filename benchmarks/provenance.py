"""What a results file says about the origin of its figures."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

REPO = Path(__file__).parent.parent
PACKAGES = (
    "triton",
    "megatron-core",
    "transformer-engine",
    "megablocks",
    "grouped_gemm",
    "transformers",
    "nvidia-cudnn-cu13",
)


def provenance() -> str:
    """Commit, date, machine and torch, for a results file. Without a git repository, $COMMIT names the commit."""
    return (
        f"commit {os.environ.get('COMMIT') or _commit() or 'unknown'}, {date.today()}, {os.cpu_count()} CPU cores "
        f"({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}"
    )


def _commit() -> str:
    """`-dirty` if a tracked file is changed. Benchmark results do not count: several may be recorded in a row."""
    if not (REPO / ".git").exists():
        return ""
    changed = _git("status", "--porcelain", "--untracked-files=no", ":/", ":!benchmarks/results")
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=REPO, capture_output=True, text=True, timeout=60).stdout.strip()


def versions() -> str:
    """The versions of the packages that a GPU step may use, of the driver and of CUDA, if they are installed."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split()
        except OSError:  # a container may have the driver without its tools
            driver = []
        found += [f"driver {driver[0] if driver else 'unknown'}", f"CUDA {torch.version.cuda}"]
    return ", ".join(found)
