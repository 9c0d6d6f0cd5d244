"""If the disk fills during a save, a line says so, the run continues, and published checkpoints stay."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.support import metrics, small_run, training, write_run


def no_file_of_more_than_64_kib() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failed_save_stops_nothing(tmp_path: Path, data: dict[str, str], ranks: int) -> None:
    """The first save succeeds, before the disk is full; then the writers fail."""
    run, folder = write_run(tmp_path, small_run(tmp_path, data, checkpoint__every_tokens=512)), tmp_path / "run"
    assert training(run, "debug.max_steps=2").run(ranks).returncode == 0
    full = training(run, before=no_file_of_more_than_64_kib).run(ranks)
    assert full.returncode == 1, full.stderr
    assert full.stderr.count("error: this checkpoint was not saved: ") == 4  # after steps 4, 5 (a phase ends), 6 and 8
    assert "Traceback" not in full.stderr
    assert len(metrics(folder)) == 8
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["tokens_512"]
    again = training(run).run(ranks)
    assert again.returncode == 0, again.stderr
    assert (folder / "checkpoints" / "tokens_2048").is_dir()
