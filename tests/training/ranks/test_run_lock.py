"""Two runs never write into one folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tests.support import metrics, pretrain, small_run, write_run


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, data: dict) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run_file, "debug.max_steps=2").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    lock = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as the first run has it
    refused = pretrain(2, run_file)
    os.close(lock)
    assert refused.returncode != 0
    lines = [line for line in refused.stderr.splitlines() if "error: output_dir" in line]
    assert len(lines) == 1 and "another process is training into" in lines[0], refused.stderr
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
    assert pretrain(1, run_file).returncode == 0
    assert len(metrics(tmp_path / "run")) == 8
