"""The recipes of docs/extending.md, followed word for word in a copy of the repository."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support import REPO, command, losses, small_run, write_run

PAGE = (REPO / "docs/extending.md").read_text()
STEP = re.compile(
    r"^\*\*`(\S+)`\*\*, (a new file|(?:below|instead of) `([^\n]+)`):\n\n```python\n(.*?)```$", re.M | re.S
)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with all that the page adds."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("jetmoe_megatron", "data_tools"):
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pretrain_jetmoe.py", copy)
    steps = STEP.findall(PAGE)
    assert len(steps) == PAGE.count("```python") >= 16
    for name, where, anchor, code in steps:
        file = copy / name
        if where == "a new file":
            assert not file.exists()
            file.write_text(code)
            continue
        text = file.read_text()
        assert text.count(anchor) == 1, f"{name}: {anchor}"
        new = code if where.startswith("instead") else f"{anchor}\n{code}"
        file.write_text(text.replace(anchor, new.removesuffix("\n")))
    return copy


def test_training_with_all_that_was_added(extended: Path, tmp_path: Path, data: dict[str, str]) -> None:
    tree = small_run(tmp_path, data)
    tree["phases"][1]["learning_rate"] = "linear"
    tree["logging"] = {"csv": True, "first_steps": 3, "every_steps": 100}
    tree["parallel"] = {"overlap_grad_reduce": True, "grad_bucket_numbers": 1000}
    found = {}
    for backend in ("padded", "loop"):
        tree["model"]["expert_backend"], tree["output_dir"] = backend, str(tmp_path / backend)
        run_file = write_run(tmp_path, tree)
        options = ("--standalone", "--nproc-per-node=2", extended / "pretrain_jetmoe.py", run_file)
        trained = command("env", f"PYTHONPATH={extended}", sys.executable, "-m", "torch.distributed.run", *options)
        assert trained.returncode == 0, trained.stderr
        found[backend] = [number for step in losses(tmp_path / backend) for number in step]
    assert found["padded"] == pytest.approx(found["loop"], rel=1e-5)
    progress = [line for line in trained.stdout.splitlines() if line.startswith("step")]
    assert [line.split("/")[0].split()[-1] for line in progress] == ["1", "2", "3", "8"]
    table = (tmp_path / "loop/logs/metrics.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in table] == list(range(1, 9))


def test_what_does_not_fit_is_refused(extended: Path, tmp_path: Path, data: dict[str, str]) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    program = [sys.executable, extended / "pretrain_jetmoe.py", run_file, "parallel.grad_bucket_numbers=10"]
    refused = command("env", f"PYTHONPATH={extended}", *program)
    assert refused.returncode == 2
    assert refused.stderr == "error: parallel.grad_bucket_numbers: needs overlap_grad_reduce\n"
