"""Hardware files: the GPUs of a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetmoe_megatron.config.flops import peak_tflops
from jetmoe_megatron.config.hardware import Assumed, Hardware, load_hardware
from jetmoe_megatron.errors import UserError
from tests.support import REPO

FILES = sorted((REPO / "configs/hardware").glob("*.yaml"))


def test_the_shipped_ones() -> None:
    assert [file.stem for file in FILES] == ["a100", "b200", "h100", "h200"]
    for file in FILES:
        hardware = load_hardware(file)
        assert hardware.assumed == Assumed()
        assert peak_tflops(hardware.gpu) in (hardware.bf16_tflops, None)  # which the benchmarks divide by


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpus: x", "gpus: unknown key; did you mean 'gpu'?"),
        ("gpu: x", "bf16_tflops: required key is missing"),
        ("gpu: '  '", "gpu: "),
        ("bf16_tflops: 0", "bf16_tflops: must be greater than or equal to 0.000000001, not 0"),
        ("assumed: {memory: 1e-300}", "assumed.memory: must be greater than or equal to 0.000001, not 1e-300"),
        ("assumed: {matmul: 1.2}", "assumed.matmul: must be less than or equal to 1, not 1.2"),
        ("dollars_per_gpu_hour: .nan", "dollars_per_gpu_hour: must be"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    lines = {line.partition(":")[0]: line for line in FILES[0].read_text().splitlines() if not line.startswith("#")}
    key = text.partition(":")[0]
    file = tmp_path / "mine.yaml"
    file.write_text(text if text == "gpu: x" else "\n".join({**lines, key: text}.values()))
    with pytest.raises(UserError) as error:
        load_hardware(file)
    assert str(error.value).startswith(f"{file}: {said}") and "\n" not in str(error.value)


def test_every_key_has_a_meaning() -> None:
    assert all(
        field.description
        for section in (Hardware, Assumed)
        for field in section.model_fields.values()
        if field.annotation is not Assumed
    )
