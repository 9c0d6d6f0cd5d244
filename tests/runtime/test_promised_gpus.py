"""No rank trains on a CPU where there should be a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from jetmoe_megatron.errors import UserError
from jetmoe_megatron.runtime.promised_gpus import check_device, promise_of_gpus
from tests.support import metrics, pretrain, small_run, training, write_run


@pytest.mark.parametrize(
    ("environment", "promise"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES is 0,1"),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "8"}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE is 8"),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        ({"SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS is 0,1"),
    ],
)
def test_what_the_environment_promises(environment: dict[str, str], promise: str | None, tmp_path: Path) -> None:
    assert promise_of_gpus(environment, tmp_path) == promise


def test_device_files_are_a_promise(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()  # is there without a GPU too
    assert promise_of_gpus({}, tmp_path) is None
    (tmp_path / "nvidia0").touch()
    assert promise_of_gpus({}, tmp_path) == f"{tmp_path}/nvidia0 is there"
    assert promise_of_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_without_its_gpu_is_refused(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    refused = pretrain(1, run_file, "device=cuda")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: device: cuda, but torch sees no GPU: ") and refused.stderr.count("\n") == 1
    promised = training(run_file, before=promise).run()
    assert promised.returncode == 2 and promised.stderr.count("\n") == 1
    assert promised.stderr.startswith("error: device: CUDA_VISIBLE_DEVICES is 0, but torch sees no GPU: ")
    assert not (tmp_path / "run").exists()
    on_cpu = training(run_file, "device=cpu", "debug.max_steps=1", before=promise).run()
    assert on_cpu.returncode == 0, on_cpu.stderr
    assert len(metrics(tmp_path / "run")) == 1


def promise() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"


def test_a_plan_for_another_machine_needs_no_gpu_here(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data, device="cuda"))
    assert pretrain(1, run_file, "--dry-run", "--world", "2").returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_rank_without_its_gpu_ends_all(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    sound, broken, *others = training(run_file, before=promise_on_rank_1).to_their_ends(4, timeout=40)
    assert {rank.returncode for rank in (sound, broken, *others)} == {2}
    assert "error: device: CUDA_VISIBLE_DEVICES is 0, but torch sees no GPU: " in broken.stderr
    assert "error: rank 1 on " in sound.stderr and "device: CUDA_VISIBLE_DEVICES is 0, but" in sound.stderr
    assert all(rank.stderr.endswith(sound.stderr) for rank in others)  # without a launcher, each rank says it
    assert broken.stderr.count("\n") == sound.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def promise_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        promise()


def test_more_ranks_than_gpus() -> None:
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "device_count", lambda: 2),
        patch.dict(os.environ, LOCAL_RANK="1"),
    ):
        check_device("auto")
        os.environ["LOCAL_RANK"] = "2"
        with pytest.raises(UserError, match="LOCAL_RANK is 2, but torch sees 2 GPUs: start at most 2 ranks"):
            check_device("cuda")
        check_device("cpu")
