"""Real runs on one GPU: every backend learns as a CPU does, and a checkpoint goes on on the other device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jetmoe_megatron.model.experts.choose import _missing
from tests.support import REPO, environment, metrics, small_run, write_run

CPU, GPU = "", os.environ.get("CUDA_VISIBLE_DEVICES", "0")


def train(device: str, run_file: Path, *overrides: str) -> None:
    command = [sys.executable, "pretrain_jetmoe.py", str(run_file), *overrides]
    hidden = {**environment(), "CUDA_VISIBLE_DEVICES": device}
    result = subprocess.run(command, cwd=REPO, env=hidden, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def losses(folder: Path) -> list[float]:
    return [record["lm_loss"] for record in metrics(folder / "run")]


@pytest.fixture(scope="module")
def on_a_cpu(data: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    result = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path_factory.mktemp(precision)
        train(CPU, write_run(folder, small_run(folder, data, precision=precision)))
        result[precision] = losses(folder)
    return result


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        ("torch", "fp32", 1e-3),
        ("torch", "bf16", 2e-2),
        ("te", "bf16", 2e-2),
        ("megablocks", "bf16", 2e-2),
        ("te_fp8", "bf16", 5e-2),
    ],
)
def test_learns_as_on_a_cpu(
    name: str, precision: str, tolerance: float, data: dict, on_a_cpu: dict, tmp_path: Path
) -> None:
    if name != "torch" and (reason := _missing(name)):
        pytest.skip(reason)
    train(GPU, write_run(tmp_path, small_run(tmp_path, data, precision=precision, model__expert_backend=name)))
    assert losses(tmp_path) == pytest.approx(on_a_cpu[precision], rel=tolerance)


@pytest.mark.parametrize(("first", "then"), [(GPU, CPU), (CPU, GPU)], ids=["gpu to cpu", "cpu to gpu"])
def test_checkpoint_on_the_other_device(first: str, then: str, data: dict, on_a_cpu: dict, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    train(first, run_file, "debug.max_steps=4")
    train(then, run_file)
    assert losses(tmp_path) == pytest.approx(on_a_cpu["fp32"], rel=1e-3)


def test_resumed_as_if_never_stopped(data: dict, tmp_path: Path) -> None:
    """On a GPU bits may differ, as matmuls may be split in another way; a lost moment would show at once."""
    for name, stops in (("whole", ()), ("stopped", ("debug.max_steps=4",))):
        run_file = write_run(tmp_path / name, small_run(tmp_path / name, data))
        for override in stops:
            train(GPU, run_file, override)
        train(GPU, run_file)
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
