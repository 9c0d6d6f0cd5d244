"""The text of `nvidia-smi --format=csv,noheader,nounits`, written after its documentation: no GPU was asked."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from jetmoe_megatron.doctor import nvidia_smi
from jetmoe_megatron.doctor.nvidia_smi import GPU, parse

HEALTHY = "0, GPU-0f1c, 1650522000001, 1980, 1980, 41, 0, Not Active, Not Active, Not Active, Not Active\n"
THROTTLED = "1, GPU-99aa, [N/A], 345, 1980, 92, 3, Active, Not Active, Active, Not Active\n"


def test_a_line_for_each_gpu() -> None:
    gpus, why = parse(HEALTHY + THROTTLED)
    assert why == ""
    assert gpus[0] == GPU("0", "GPU-0f1c", "1650522000001", "1980", "1980", "41", "0", ())
    assert gpus[0].problems() == []
    assert gpus[1].serial == "" and gpus[1].problems() == [
        "nvidia-smi: hw_thermal_slowdown holds the clock at 345 MHz",
        "nvidia-smi: hw_slowdown holds the clock at 345 MHz",
        "nvidia-smi: 3 uncorrected memory (ECC) errors",
    ]


def test_a_gpu_that_counts_no_errors() -> None:
    (gpu,), _ = parse(HEALTHY.replace(", 0, Not", ", [Not Supported], Not"))
    assert gpu.memory_errors == "" and gpu.problems() == []


def test_other_text_is_told_as_it_is() -> None:
    assert parse("No devices were found\n") == ([], "nvidia-smi gave 1 values for 11: No devices were found")


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (f"printf '{HEALTHY.strip()}'", ""),
        ("echo 'Field \"serial\" is not a valid field'; exit 2", 'nvidia-smi ended with status 2: Field "serial" is'),
        ("exec sleep 100", "nvidia-smi did not answer in 0 s"),
    ],
)
def test_the_program(script: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script stands for it."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if "sleep" in script:
        monkeypatch.setattr(nvidia_smi, "_SECONDS", 0.1)
    gpus, said = nvidia_smi.answer(nvidia_smi.start())
    assert said.startswith(why) and bool(gpus) is (why == "") and bool(said) is bool(why)


def test_without_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi.answer(nvidia_smi.start()) == ([], "")
