"""A run that was begun with one version of Megatron-Core goes on with the other, to the bit.

OTHER_PYTHON names the interpreter of another environment: `make test-stack` sets it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import REPO, command, jetmoe, losses, pretrain, small_run, write_run

OTHER = os.environ.get("OTHER_PYTHON")
PYTHONS = {"this one": sys.executable, "the other one": OTHER or ""}
# Ranks and parallel section, at the beginning and after the resume.
LAYOUTS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "one": [(1, {}), (1, {})],
    "tp2 to pp2": [(2, {"tensor": 2}), (2, {"pipeline": 2})],
}

pytestmark = pytest.mark.skipif(not OTHER, reason="OTHER_PYTHON names no environment with another Megatron-Core")


def train(python: str, ranks: int, run: Path, *overrides: str) -> None:
    if python == sys.executable:
        ended = pretrain(ranks, run, *overrides)
    else:
        launcher = [python, "-m", "jetmoe_megatron.launch.elastic", "--standalone", f"--nproc-per-node={ranks}"]
        ended = command(*launcher, "pretrain_jetmoe.py", run, *overrides)
    assert ended.returncode == 0, ended.stderr


def test_they_are_two_versions() -> None:
    say = "import importlib.metadata; print(importlib.metadata.version('megatron-core'))"
    versions = [command(python, "-c", say, cwd=REPO).stdout for python in PYTHONS.values()]
    assert all(versions)
    if versions[0] == versions[1]:
        pytest.skip(f"both environments have Megatron-Core {versions[0].strip()}")


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("first", PYTHONS)
def test_resumed_to_the_bit(
    first: str, layouts: list[tuple[int, dict[str, Any]]], tmp_path: Path, data: dict[str, str]
) -> None:
    """The truth is the version that began, which goes on alone."""
    (ranks, parallel), after = layouts
    train(PYTHONS[first], ranks, write_run(tmp_path, small_run(tmp_path, data, parallel=parallel)), "debug.max_steps=4")
    results = []
    for name, python in PYTHONS.items():
        folder = tmp_path / name.replace(" ", "-")
        shutil.copytree(tmp_path / "run", folder / "run")
        train(python, after[0], write_run(folder, small_run(folder, data, parallel=after[1])))
        assert jetmoe("convert", "to-hf", folder / "run", folder / "hf").returncode == 0
        results.append((losses(folder / "run"), (folder / "hf/model.safetensors").read_bytes()))
    (here, weights), (there, other_weights) = results
    assert len(here) == 8 and here == there and weights == other_weights
