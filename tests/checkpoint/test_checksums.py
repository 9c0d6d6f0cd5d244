"""A checkpoint is either whole or not there."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.checkpoint.checksums import CHECKSUMS, find_damage, newest_whole
from jetmoe_megatron.checkpoint.metadata import read_metadata
from jetmoe_megatron.errors import SharedError, may_pass
from tests.support import losses, pretrain, small_run, write_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """A run of 4 of its 8 steps with checkpoints after 2 and 4, saved beside the training by two ranks."""
    folder = tmp_path_factory.mktemp("trained")
    run = write_run(folder, small_run(folder, data, checkpoint__every_tokens=512))
    ended = pretrain(2, run, "debug.max_steps=4")
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path, data: dict[str, str]) -> Path:
    shutil.copytree(trained / "run", tmp_path / "run")
    write_run(tmp_path, small_run(tmp_path, data, checkpoint__every_tokens=512))
    return tmp_path


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "run" / "checkpoints").iterdir())


def test_saved_whole(trained: Path) -> None:
    assert checkpoints(trained) == ["tokens_1024", "tokens_512"]
    for path in (trained / "run" / "checkpoints").iterdir():
        assert find_damage(path) is None
        listed = json.loads((path / CHECKSUMS).read_text())
        assert {p.name for p in path.iterdir()} == {*listed, CHECKSUMS}
        read_metadata(path)


@pytest.mark.parametrize("seed", range(40))
def test_any_harm_is_found(trained: Path, tmp_path: Path, seed: int) -> None:
    """A file cut short, a bit turned, a file gone, a file grown; found whichever file it is."""
    path = tmp_path / "tokens_1024"
    shutil.copytree(trained / "run" / "checkpoints" / "tokens_1024", path)
    chance = random.Random(seed)
    file = chance.choice(sorted(path.iterdir()))
    harm(file, ["cut", "turn", "remove", "grow"][seed % 4], chance)
    found = find_damage(path)
    assert found and "\n" not in found and file.name in found
    assert [reason for n in range(3) if (reason := find_damage(path, share=(n, 3)))] != []


def harm(file: Path, how: str, chance: random.Random) -> None:
    size = file.stat().st_size
    if how == "cut":
        os.truncate(file, chance.randrange(size))
    elif how == "remove":
        file.unlink()
    elif how == "grow":
        file.write_bytes(file.read_bytes() + b"x")
    else:
        content = bytearray(file.read_bytes())
        content[chance.randrange(size)] ^= 1 << chance.randrange(8)
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["turn", "remove"])
def test_the_one_before_is_used(copy: Path, whole_losses: list, how: str) -> None:
    """A turned byte in a large file shows only in its checksum, which the ranks compute together."""
    newest = copy / "run" / "checkpoints" / "tokens_1024"
    file = max(newest.iterdir(), key=lambda p: p.stat().st_size)
    harm(file, how, random.Random(1))
    ended = pretrain(2, copy / "run.yaml")
    assert ended.returncode == 0, ended.stderr
    assert f"warning: {newest} is damaged: {file.name}" in ended.stderr
    assert "set aside as tokens_1024.damaged" in ended.stderr
    assert "tokens_1024.damaged" in checkpoints(copy) and "tokens_1024" in checkpoints(copy)
    assert losses(copy / "run") == whole_losses


@pytest.fixture(scope="module")
def whole_losses(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> list:
    folder = tmp_path_factory.mktemp("whole")
    assert pretrain(2, write_run(folder, small_run(folder, data))).returncode == 0
    return losses(folder / "run")


def test_with_none_left_it_stops(copy: Path) -> None:
    for path in (copy / "run" / "checkpoints").iterdir():
        (path / CHECKSUMS).unlink()
    ended = pretrain(1, copy / "run.yaml")
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert "is damaged, and no whole checkpoint is left" in last
    assert checkpoints(copy) == ["tokens_1024.damaged", "tokens_512.damaged"]


def test_newest_whole(trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(trained / "run" / "checkpoints", root)
    assert newest_whole(root) == root / "tokens_1024"
    (root / "tokens_1024" / "run.yaml").write_text("name: other\n")
    assert newest_whole(root) == root / "tokens_512"


@pytest.mark.parametrize("which", [CHECKSUMS, "common.pt"])
def test_what_cannot_be_read_now_is_no_damage(
    copy: Path, data: dict, world_of_one: None, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system that has lost its server for a moment must not cost a checkpoint."""
    from jetmoe_megatron.config import load_run
    from jetmoe_megatron.resume.damage import set_damaged_aside

    real = builtins.open

    def failing(file: Any, *arguments: Any, **more: Any) -> Any:
        if str(file).endswith(which):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return real(file, *arguments, **more)

    before = checkpoints(copy)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", failing)
        patch.setattr(io, "open", failing)
        with pytest.raises(SharedError, match=f"rank 0 cannot read .*tokens_1024/{which}: Input/output error") as error:
            set_damaged_aside(load_run(copy / "run.yaml"))
    assert may_pass(error.value)
    assert checkpoints(copy) == before
    set_damaged_aside(load_run(copy / "run.yaml"))
    assert checkpoints(copy) == before
