"""oneDNN multiplies fp32 matrices where MKL is slow, and never rounds them. Slow bf16 matmuls give a warning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jetmoe_megatron.runtime import matmul
from jetmoe_megatron.runtime.matmul import bf16_is_slow, by_onednn, choose_matmul
from tests.support import pretrain, small_run, write_run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """One on which MKL is slow."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    (tmp_path / "cpuinfo").write_text("vendor_id\t: AuthenticAMD\n")
    monkeypatch.setattr(matmul, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    yield monkeypatch
    torch.set_float32_matmul_precision(before)


def test_whatever_is_chosen_computes_in_fp32() -> None:
    choose_matmul()
    a, b = torch.randn(300, 500, generator=torch.Generator().manual_seed(1)), torch.ones(500, 200) / 3
    exact = a.double() @ b.double()
    assert (a @ b - exact).abs().max() < 1e-5 * exact.abs().max()


def test_chosen_where_mkl_is_slow(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(matmul, "_rounds", lambda: False)
    assert not by_onednn(torch.float32) and by_onednn(torch.bfloat16)
    choose_matmul()
    assert by_onednn(torch.float32)


def test_not_chosen_where_it_would_round(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(matmul, "_rounds", lambda: True)
    choose_matmul()
    assert not by_onednn(torch.float32)


def test_rounding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not matmul._rounds()
    times = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: times(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else times(a, b),
    )
    assert matmul._rounds()


@pytest.mark.parametrize("harm", ["another vendor", "no AVX-512", "another system"])
def test_not_chosen_elsewhere(machine: pytest.MonkeyPatch, tmp_path: Path, harm: str) -> None:
    if harm == "another vendor":
        (tmp_path / "cpuinfo").write_text("vendor_id\t: GenuineIntel\n")
    elif harm == "no AVX-512":
        machine.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    else:
        (tmp_path / "cpuinfo").unlink()
    choose_matmul()
    assert not by_onednn(torch.float32)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_cpu_without_bf16_matmuls_is_told(
    precision: str, tmp_path: Path, data: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, small_run(tmp_path, data, precision=precision))
    for limit, slow in (("DEFAULT", bf16_is_slow()), ("AVX2", True)):  # as if the CPU had no AVX-512
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        result = pretrain(1, run, "--dry-run")
        assert result.returncode == 0, result.stderr
        warns = "warning: precision: this CPU has no kernel for bf16 matmuls" in result.stdout
        assert warns == (slow and precision == "bf16")
