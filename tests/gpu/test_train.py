"""Real runs on one GPU: every backend learns as on a CPU, and a checkpoint continues on the other device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jetmoe_megatron.model.experts.choose_backend import _missing
from tests.support import REPO, environment, metrics, small_run, write_run

CPU, GPU = "", os.environ.get("CUDA_VISIBLE_DEVICES", "0")
STOP = "debug.max_steps=4"
Losses = Callable[[str], list[float]]

# backend, precision, and where the parts of the run are trained: the first of two stops after half of the steps
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "cpu fp32": ("torch", "fp32", (CPU,)),
    "cpu bf16": ("torch", "bf16", (CPU,)),
    "torch fp32": ("torch", "fp32", (GPU,)),
    "torch bf16": ("torch", "bf16", (GPU,)),
    "te bf16": ("te", "bf16", (GPU,)),
    "megablocks bf16": ("megablocks", "bf16", (GPU,)),
    "te_fp8 bf16": ("te_fp8", "bf16", (GPU,)),
    "gpu to cpu": ("torch", "fp32", (GPU, CPU)),
    "cpu to gpu": ("torch", "fp32", (CPU, GPU)),
    "gpu to gpu": ("torch", "fp32", (GPU, GPU)),
}
AT_ONCE = len(RUNS)  # processes: most of their time goes into starting


@pytest.fixture(scope="module")
def losses(data: dict, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Losses]:
    """The losses of each step of the run of that name; all runs are begun together."""

    def train(name: str) -> list[float]:
        backend, precision, devices = RUNS[name]
        folder = tmp_path_factory.getbasetemp() / name.replace(" ", "_")
        run_file = write_run(folder, small_run(folder, data, precision=precision, model__expert_backend=backend))
        for part, device in enumerate(devices, start=1):
            command: list[str | Path] = [
                sys.executable,
                "pretrain_jetmoe.py",
                run_file,
                *([STOP] if part < len(devices) else []),
            ]
            hidden = {**environment(), "CUDA_VISIBLE_DEVICES": device, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            result = subprocess.run(command, cwd=REPO, env=hidden, capture_output=True, text=True, timeout=240)
            assert result.returncode == 0, result.stderr
        return [record["lm_loss"] for record in metrics(folder / "run")]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        begun = {name: pool.submit(train, name) for name, (backend, *_) in RUNS.items() if not missing(backend)}
        yield lambda name: begun[name].result()


def missing(backend: str) -> str | None:
    return None if backend == "torch" else _missing(backend)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("torch fp32", 1e-3), ("torch bf16", 2e-2), ("te bf16", 2e-2), ("megablocks bf16", 2e-2), ("te_fp8 bf16", 5e-2)],
)
def test_learns_as_on_a_cpu(name: str, tolerance: float, losses: Losses) -> None:
    backend, precision, _ = RUNS[name]
    if reason := missing(backend):
        pytest.skip(reason)
    assert losses(name) == pytest.approx(losses(f"cpu {precision}"), rel=tolerance)


@pytest.mark.parametrize("name", ["gpu to cpu", "cpu to gpu"])
def test_checkpoint_on_the_other_device(name: str, losses: Losses) -> None:
    assert losses(name) == pytest.approx(losses("cpu fp32"), rel=1e-3)


def test_resumed_as_if_never_stopped(losses: Losses) -> None:
    """On a GPU bits may differ, as matmuls may be split in another way; a lost moment would show at once."""
    assert losses("gpu to gpu") == pytest.approx(losses("torch fp32"), rel=1e-5)
