"""The step benchmarks run on a CPU, on tiny shapes; their formulas are those of the published model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from benchmarks.kernels import group_of
from benchmarks.processes import why_it_ended
from jetmoe_megatron.config.flops import peak_tflops, step_flops
from jetmoe_megatron.config.schema import Model
from tests.support import REPO, command


def test_flops_of_jetmoe_8b() -> None:
    model = Model.model_validate(yaml.safe_load((REPO / "configs/models/jetmoe_8b.yaml").read_text()))
    flops = step_flops(model, sequence_length=4096, tokens=1)
    assert flops.weights_only == 6 * 2_331_445_248  # docs/model.md
    # scores and their product with the values: 2 operations, 32 heads of 128, half of 4096 keys, and twice as backward
    assert flops.with_attention - flops.weights_only == 24 * 3 * (2 * 2 * 32 * 128 * 4096 / 2)
    assert peak_tflops("NVIDIA H200") == 989.4
    assert peak_tflops("another") is None


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("aten::bmm", "attention"),
        ("aten::mm", "matmul"),
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_TNT", "matmul"),
        ("void cutlass::device_kernel<...GroupProblemShape<...>>", "grouped matmul"),
        ("_padded_copy", "gather and scatter"),
        ("triton_poi_fused_mul_silu_0", "fused elementwise"),
        ("void multi_tensor_apply_kernel<... FusedAdamMathFunctor ...>", "optimizer and gradient norm"),
        ("Memcpy DtoD (Device -> Device)", "memory"),
        ("void at::native::vectorized_elementwise_kernel<...>", "elementwise and reductions"),
        ("something", "other"),
    ],
)
def test_kernel_groups(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


@pytest.mark.parametrize(
    ("status", "stderr", "said"),
    [
        (1, "[rank0]: a.MemoryError: x\n[rank0]:[W1128 1 x.cpp:1] Warning: destroy\n", "a.MemoryError: x"),
        (-11, "a warning\n", "died of SIGSEGV"),
        (3, "", "exited with status 3"),
    ],
)  # fmt: skip
def test_why_a_process_ended(status: int, stderr: str, said: str) -> None:
    assert why_it_ended(subprocess.CompletedProcess([], status, "", stderr)) == said


def test_gpu_step_without_a_gpu() -> None:
    result = command(sys.executable, "-m", "benchmarks.gpu_step", timeout=180)
    assert result.returncode == 0, result.stderr
    for row in ("| torch | ", "| loop | ", "| transformers | ", "| ours | ", "| SequentialMLP | ", "| flash | "):
        assert row in result.stdout
    assert "| te | not measured: model.expert_backend: te needs a GPU" in result.stdout
    assert "6N: 6 x active weights x tokens" in result.stdout
    assert "no GPU: tiny shapes, figures of no interest" in result.stdout


@pytest.mark.slow
def test_one_process_of_gpu_step() -> None:
    result = command(sys.executable, "-m", "benchmarks.gpu_step", "--only", "torch", timeout=120)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["seconds"] > 0 and dict(measured["groups"])["matmul"] > 0


@pytest.mark.slow
def test_loss_curves_without_a_gpu() -> None:
    result = command(sys.executable, "-m", "benchmarks.loss_curves", timeout=180)
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert rows[0] == "| steps | torch | loop |"
    first, last = (float(rows[i].split("|")[2]) for i in (1, 10))
    assert last < first
    for row in rows[1:12]:  # the backends differ by rounding alone
        assert abs(float(row.split("(")[1].split(")")[0])) < 0.01
    assert rows[11].startswith("| held out | ") and "a tiny model, figures of no interest" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["gpu_step", "loss_curves"])
def test_nothing_is_recorded_without_a_gpu(benchmark: str) -> None:
    result = command(sys.executable, "-m", f"benchmarks.{benchmark}", "--record", timeout=180)
    assert result.returncode != 0 and "--record needs a GPU" in result.stderr


@pytest.mark.slow
def test_cpu_step() -> None:
    result = command(sys.executable, "-m", "benchmarks.cpu_step", "--tiny", "--rounds", "1", timeout=120)
    assert result.returncode == 0, result.stderr
    for precision in ("fp32", "bf16"):
        for name in ("transformers", "ours", "bare", "matmul", 8, 32, 128):
            assert f"| {precision} | {name} | " in result.stdout


def test_monitor() -> None:
    result = command(sys.executable, "-m", "benchmarks.monitor", "--tiny", "--steps", "20", timeout=120)
    assert result.returncode == 0, result.stderr
    for precision in ("fp32", "bf16"):
        for part in (
            "entropy and margin of tokens",
            "sums of the routers",
            "a line of routers.jsonl",
            "alarms",
            "all",
            "the step",
        ):
            assert f"| {precision} | {part} | " in result.stdout


def test_cpu_attention() -> None:
    result = command(sys.executable, "-m", "benchmarks.cpu_attention", "--tiny", "--rounds", "2", timeout=200)
    assert result.returncode == 0, result.stderr
    assert [line.split(" | ")[:2] for line in result.stdout.splitlines()] == [["| fp32", "16"], ["| bf16", "16"]]
