"""Exports during training: due at the first checkpoint past each multiple, never in training's way."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from jetmoe_megatron.convert.export import Exports
from jetmoe_megatron.convert.verify import compare_tensors
from tests.convert.conftest import Saved


def checkpoint_at(saved: Saved, root: Path, tokens: int) -> Path:
    return Path(shutil.copytree(saved.checkpoint, root / "checkpoints" / f"tokens_{tokens}"))


def test_the_first_checkpoint_past_each_multiple(saved: Saved, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    exports = Exports(1000, hf)
    for tokens in (600, 1100, 1900, 3500):
        started = time.monotonic()
        exports.checkpoint_published(checkpoint_at(saved, tmp_path, tokens))
        assert time.monotonic() - started < 2
    exports.wait()
    assert {path.name for path in hf.iterdir()} == {"tokens_1100", "tokens_3500"}
    for path in hf.iterdir():
        assert compare_tensors(path, saved.checkpoint).different == 0
    again = Exports(1000, hf)  # after the run was resumed
    again.checkpoint_published(checkpoint_at(saved, tmp_path, 3900))
    Exports(0, tmp_path / "none").checkpoint_published(checkpoint_at(saved, tmp_path, 4000))
    again.wait()
    assert len(list(hf.iterdir())) == 2 and not (tmp_path / "none").exists()


def test_a_failure_is_one_line(saved: Saved, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = checkpoint_at(saved, tmp_path, 1000)
    (checkpoint / ".metadata").unlink()
    exports = Exports(1000, tmp_path / "hf")
    exports.checkpoint_published(checkpoint)
    exports.wait()
    assert list((tmp_path / "hf").iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    Exports(1000, tmp_path / "file").checkpoint_published(checkpoint)
    assert [line.replace(str(tmp_path), "") for line in capfd.readouterr().err.splitlines()] == [
        "warning: /hf/tokens_1000: not exported: /checkpoints/tokens_1000: not a whole checkpoint: it has no .metadata",
        "warning: /file/tokens_1000: not exported: [Errno 20] Not a directory: '/file/tokens_1000.partial'",
    ]
