"""Checkpoints of earlier commits still load. `tests/golden/make.py` says what they are and how to add one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.checkpoint.checksums import CHECKSUMS, find_damage
from tests.golden.make import GOLDEN, digest_of_export, environment_of_numbers
from tests.support import environment, jetmoe, metrics
from tests.warm import Command

NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.json"))
# Commits whose code rounded in another way than today's. If that changes on purpose, add the commits before.
OTHER_ROUNDING = {"65d83d8", "6290843"}
OTHER_LAYOUT = {1: (2, "parallel.tensor=2"), 2: (1, "parallel.expert=1")}  # by ranks: (ranks, override)
# Largest relative difference of a loss and of a gradient norm.
TOLERANCE = {"fp32": (1e-5, 1e-5), "bf16": (2e-3, 2e-2)}


class Golden:
    """A copy of a golden checkpoint, so that nothing is written into the repository."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        shutil.copytree(GOLDEN / name, folder)
        self.expected: dict[str, Any] = json.loads((folder / "expected.json").read_text())
        self.checkpoint = folder / self.expected["checkpoint"]

    def check_resume(self, ranks: int, *overrides: str, to_the_bit: bool) -> None:
        """Resume it, and compare the loss and the gradient norm of each step with those of its own commit."""
        run = ["pretrain", "run.yaml", *self.expected["resume"], *overrides]
        ended = Command(run, environment(), self.folder).run(ranks)
        assert ended.returncode == 0, ended.stderr
        steps: dict[str, dict[str, str]] = self.expected["steps"]
        resumed = {str(record["step"]): record for record in metrics(self.folder / "run")}
        assert set(steps) <= set(resumed) and min(resumed, key=int) == min(steps, key=int)
        for step, numbers in steps.items():
            tolerances = TOLERANCE["bf16" if self.name.startswith("bf16") else "fp32"]
            for (key, value), tolerance in zip(numbers.items(), tolerances, strict=True):
                expected = float.fromhex(value)
                limit = expected if to_the_bit else pytest.approx(expected, rel=tolerance)
                assert resumed[step][key] == limit, f"{key} of step {step}"


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    return Golden(request.param, tmp_path / "golden")


def test_it_resumes(golden: Golden) -> None:
    """To the bit where it was made with the same libraries on the same CPU: the kernels of another CPU round in
    another way."""
    here = environment_of_numbers()
    same = here == {key: golden.expected[key] for key in here} and golden.expected["commit"] not in OTHER_ROUNDING
    golden.check_resume(golden.expected["ranks"], to_the_bit=same)


def test_it_resumes_in_another_layout(golden: Golden) -> None:
    golden.check_resume(*OTHER_LAYOUT[golden.expected["ranks"]], to_the_bit=False)


def test_its_export_is_the_same_to_the_bit(golden: Golden) -> None:
    exported = golden.folder / "hf"
    ended = jetmoe("convert", "to-hf", golden.checkpoint, exported)
    assert ended.returncode == 0, ended.stderr
    assert digest_of_export(exported) == golden.expected["export"]
    verified = jetmoe("convert", "verify", exported, golden.checkpoint, "--logits")
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_its_checksums_hold(golden: Golden) -> None:
    if golden.name == "from_hf-6290843":  # `from-hf` made none then
        assert not (golden.checkpoint / CHECKSUMS).exists()
        return
    assert find_damage(golden.checkpoint) is None
    file = golden.checkpoint / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert find_damage(golden.checkpoint) == "__0_0.distcp is not what was written (its checksum differs)"
