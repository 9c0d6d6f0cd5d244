"""A disk that fills while a checkpoint is written: said, the run goes on, and what was published stays."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.support import REPO, command, metrics, small_run, write_run


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failed_save_stops_nothing(tmp_path: Path, data: dict[str, str], ranks: int) -> None:
    """No file may be larger than 64 KiB, so that the first save succeeds with nothing and the writers fail later."""
    tree = small_run(tmp_path, data, checkpoint__every_tokens=512)
    run, folder = write_run(tmp_path, tree), tmp_path / "run"
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    train = [*launcher, str(REPO / "pretrain_jetmoe.py"), str(run)]
    assert command(*train, "debug.max_steps=2").returncode == 0
    full = command("bash", "-c", f"ulimit -f 64; exec {shlex.join(train)}")
    assert full.returncode == 1, full.stderr
    assert full.stderr.count("error: this checkpoint was not saved: ") == 4  # after steps 4, 5 (a phase ends), 6 and 8
    assert len(metrics(folder)) == 8
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["tokens_512"]
    again = command(*train)
    assert again.returncode == 0, again.stderr
    assert (folder / "checkpoints" / "tokens_2048").is_dir()
