"""Two runs never write into one folder."""

from __future__ import annotations

import errno
import fcntl
import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from jetmoe_megatron.config.run_folder import LOCK
from jetmoe_megatron.stopping import RESTARTS
from tests.support import metrics, pretrain, small_run, training, write_run


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, data: dict) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run_file, "debug.max_steps=2").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with open(tmp_path / "run" / LOCK, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the first run has it
        refused = pretrain(2, run_file)
    (tmp_path / "run" / LOCK).unlink()
    assert refused.returncode != 0
    lines = [line for line in refused.stderr.splitlines() if "error: output_dir" in line]
    assert len(lines) == 1 and "another process is training into" in lines[0], refused.stderr
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
    assert pretrain(1, run_file).returncode == 0
    assert len(metrics(tmp_path / "run")) == 8
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_lock_that_fails_is_one_line(tmp_path: Path, data: dict) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    refused = training(run_file, before=broken_locks).run(2)
    assert refused.returncode == 1, "a job comes back: it may pass"
    assert f"error: {tmp_path}/run/{LOCK}: cannot be locked: Input/output error" in refused.stderr
    assert refused.stderr.count("error: ") == 1


@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", RESTARTS])
def test_the_lock_of_a_lost_node_lets_the_job_come_back(tmp_path: Path, data: dict, variable: str) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / LOCK, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ends = training(run_file, before=partial(short_patience_after_a_restart, variable)).to_their_ends(2)
    assert [end.returncode for end in ends] == [1, 1]
    what = "another process, perhaps on a node that was lost, still trains into it after 0.5 s"
    assert all(end.stderr.splitlines()[-1].endswith(f"error: {tmp_path}/run: {what}") for end in ends), ends


def short_patience_after_a_restart(variable: str) -> None:
    from jetmoe_megatron.training.ranks import run_lock

    os.environ[variable] = "1"
    patch.object(run_lock, "RUN_LOCK_IS_FREE_AFTER_REQUEUE", 0.5).start()


def broken_locks() -> None:
    def fails(*arguments: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    patch.object(fcntl, "flock", fails).start()
