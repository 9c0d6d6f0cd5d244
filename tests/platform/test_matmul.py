"""oneDNN multiplies fp32 matrices where MKL is slow, and never rounds them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jetmoe_megatron.platform import matmul
from jetmoe_megatron.platform.matmul import by_onednn, choose_matmul


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
