"""`jetmoe doctor` on this machine."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from jetmoe_megatron.config import load_run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.model.attention_kernel import attention_kernel
from jetmoe_megatron.runtime.device import has_gpu
from tests.support import REPO, command, environment, jetmoe, small_run, write_run
from tests.warm import Command


@pytest.fixture
def run_file(tmp_path: Path, data: dict[str, str]) -> Path:
    return write_run(tmp_path, small_run(tmp_path, data))


@pytest.mark.skipif(has_gpu(), reason="there is a GPU, and this is what a CPU uses")
def test_it_says_what_is_there_and_used(tmp_path: Path, run_file: Path) -> None:
    told = jetmoe("doctor", run_file)
    assert told.returncode == 0, told.stdout + told.stderr
    rows = dict(line.strip().split(None, 1) for line in told.stdout.splitlines() if line.startswith("  torch "))
    assert rows["torch"].startswith("2.")
    run = load_run(run_file)
    for line in (
        "  transformer-engine       not installed: no expert_backend te and te_fp8, ",
        "  expert backend           torch: torch's grouped_mm needs no package here",
        f"  attention                {attention_kernel(run, resolve_layout(run, 1))}",
        "  exchange of rows         none: all experts are on each rank",
        "  optimizer                torch's fused AdamW",
        "  open files               ",
        "  locked memory            ",
        f"  disk                     {tmp_path}/run: ",
    ):
        assert f"\n{line}" in told.stdout, told.stdout
    assert told.stdout.endswith("nothing is known to be wrong\n")
    assert not (tmp_path / "run").exists()


def test_without_a_run_file() -> None:
    told = jetmoe("doctor")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "  Python                   3." in told.stdout and "expert backend" not in told.stdout


def of_another_torch(version: str) -> None:
    from jetmoe_megatron.doctor import known_conflicts
    from jetmoe_megatron.runtime.machine import version_of

    changed = patch.object(known_conflicts, "version_of", lambda name: version if name == "torch" else version_of(name))
    changed.start()


def test_what_is_known_not_to_work(run_file: Path) -> None:
    everything = ["jetmoe", "doctor", run_file]
    told = Command(everything, environment(), REPO, partial(of_another_torch, "2.9.1")).run()
    assert told.returncode == 5
    assert "\nwrong: torch 2.9.1: setup.py allows >=2.10,<2.15; " in told.stdout
    assert told.stdout.endswith("to mend it:\n  pip install 'torch>=2.10,<2.15'\n")


def test_what_the_run_asks_for_and_this_machine_lacks(run_file: Path) -> None:
    if has_gpu():
        pytest.skip("there is a GPU, which Transformer Engine may use")
    told = jetmoe("doctor", run_file, "model.expert_backend=te", f"output_dir={run_file}/run")
    assert told.returncode == 5
    assert "\nwrong: model.expert_backend: te needs a GPU, and there is none: use auto, torch or loop\n" in told.stdout
    assert f"\nwrong: output_dir: {run_file} is a file\n" in told.stdout


def test_a_disk_without_room_for_a_checkpoint(run_file: Path) -> None:
    told = jetmoe("doctor", run_file, "model.vocab_size=1e11")
    assert told.returncode == 5
    assert "free: that is less than one checkpoint\n" in told.stdout


def test_without_megatron(run_file: Path) -> None:
    """In a process that has not imported it."""
    code = "import sys; sys.modules['megatron.core'] = None; from jetmoe_megatron.cli import main; sys.exit(main())"
    told = command(sys.executable, "-c", code, "doctor", run_file)
    assert told.returncode == 5, told.stderr
    assert "\nwrong: Megatron-Core cannot be imported: " in told.stdout and "\nhost\n" in told.stdout


def promised() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"


def test_a_gpu_that_torch_does_not_see(run_file: Path) -> None:
    if has_gpu():
        pytest.skip("there is a GPU, and torch sees it")
    told = Command(["jetmoe", "doctor", run_file], environment(), REPO, promised).run()
    assert told.returncode == 5
    assert "\nwrong: device: CUDA_VISIBLE_DEVICES is 0, but torch sees no GPU: " in told.stdout


def test_bad_input(run_file: Path) -> None:
    for arguments, said in (
        ((run_file, "no.such=1"), "error: "),
        ((run_file, "--tolerance", "0.1"), "error: --tolerance: goes with --ranks\n"),
        (("a=1",), "error: a=1: name the run file before the settings that it changes\n"),
        ((run_file, "parallel.tensor=7"), "error: parallel.tensor: 7 does not divide "),
    ):
        refused = jetmoe("doctor", *arguments)
        assert refused.returncode == 2 and refused.stderr.startswith(said), refused.stderr
        assert refused.stderr.count("\n") == 1
