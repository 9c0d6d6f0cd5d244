"""Exports during training: due at the first checkpoint past each multiple, without stopping training."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import types
from pathlib import Path

import pytest

from jetmoe_megatron.checkpoint.folder import published, retain
from jetmoe_megatron.convert.export import Exports
from jetmoe_megatron.convert.verify import compare_tensors
from jetmoe_megatron.runtime import beside
from tests.convert.conftest import Saved
from tests.support import REPO, pretrain, small_run, write_run


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


def test_training_exports(tmp_path: Path, data: dict[str, str]) -> None:
    """Steps of 256 tokens: saved at 512, 1024, 1280 (the end of the phase), 1536, 2048; exported past each 1000."""
    options = {"checkpoint__every_tokens": 512, "checkpoint__export_every_tokens": 1000}
    run_file = write_run(tmp_path, small_run(tmp_path, data, **options))
    left = tmp_path / "run/hf/tokens_1024.partial"  # by a run that was killed
    left.mkdir(parents=True)
    (left / "config.json").touch()
    left.with_name("tokens_1024.partial.lock").touch()
    result = pretrain(2, run_file)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "run/hf").iterdir()} == {"tokens_1024", "tokens_2048"}
    for path in (tmp_path / "run/hf").iterdir():
        assert compare_tensors(path, tmp_path / "run/checkpoints" / path.name).different == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_the_signals_that_stop_a_run_leave_it_alone(saved: Saved, tmp_path: Path, signum: signal.Signals) -> None:
    """A batch system sends them to every process of the job; training waits for the export."""
    exports = Exports(1000, tmp_path / "hf")
    exports.checkpoint_published(checkpoint_at(saved, tmp_path, 1000))
    (process,) = exports._processes.values()
    deadline = time.monotonic() + 30
    while "python" not in Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")[0]:
        assert time.monotonic() < deadline
    process.send_signal(signum)
    exports.wait()
    assert (tmp_path / "hf/tokens_1000/config.json").is_file()


def test_an_export_that_was_killed_is_said(saved: Saved, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exports = Exports(1000, tmp_path / "hf")
    exports.checkpoint_published(checkpoint_at(saved, tmp_path, 1000))
    (process,) = exports._processes.values()
    process.kill()
    exports.wait()
    assert capfd.readouterr().err == f"warning: {tmp_path}/hf/tokens_1000: not exported: killed by signal 9\n"


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


def test_a_checkpoint_stays_while_it_is_read(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(command: list[str], env: dict[str, str], **more: object) -> subprocess.Popen[bytes]:
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(REPO)  # the package need not be installed
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[-1]

    exports = Exports(1000, tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(beside, "subprocess", types.SimpleNamespace(Popen=start))
        exports.checkpoint_published(checkpoint_at(saved, tmp_path, 1000))
    assert exports.is_reading(1000) and not exports.is_reading(2000)
    for tokens in (1100, 1200):
        checkpoint_at(saved, tmp_path, tokens)
    retain(tmp_path / "checkpoints", 1, exports.is_reading)
    assert [path.name for path in published(tmp_path / "checkpoints")] == ["tokens_1000", "tokens_1200"]
    started[0].kill()
    exports.wait()
    retain(tmp_path / "checkpoints", 1, exports.is_reading)
    assert [path.name for path in published(tmp_path / "checkpoints")] == ["tokens_1200"]


def test_saves_that_overtake_an_export(tmp_path: Path, data: dict[str, str]) -> None:
    """Steps take milliseconds here, an export some seconds."""
    options = {"checkpoint__every_tokens": 256, "checkpoint__export_every_tokens": 1024, "checkpoint__keep_last": 1}
    result = pretrain(1, write_run(tmp_path, small_run(tmp_path, data, **options)))
    assert result.returncode == 0 and "not exported" not in result.stderr, result.stderr
    assert {path.name for path in (tmp_path / "run/hf").iterdir()} == {"tokens_1024", "tokens_2048"}
