"""Errors of the input keep a job down (exit status 2); those of a machine let it come back."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest.mock import patch

import pytest

from data_tools.errors import InputError, reading
from jetmoe_megatron.errors import ElsewhereError, SharedError, UserError, may_pass
from jetmoe_megatron.stopping import FAILED_NODES
from tests.support import pretrain, small_run, training, write_run


@pytest.mark.parametrize(
    ("number", "passes"),
    [
        *((errno.EIO, True), (errno.ESTALE, True), (errno.ETIMEDOUT, True), (errno.ENOSPC, True), (errno.EDQUOT, True)),
        *((errno.ENOENT, False), (errno.EACCES, False), (errno.ENOTDIR, False), (errno.ELOOP, False)),
    ],
)
def test_what_may_pass(number: int, passes: bool) -> None:
    """Also if the line for the user hides the OSError."""
    error = OSError(number, os.strerror(number), "file")
    assert may_pass(error) is passes
    with pytest.raises(InputError) as refused, reading(Path("file")):
        raise error
    assert may_pass(refused.value) is passes
    with pytest.raises(UserError) as refused:
        try:
            raise error
        except OSError:
            raise UserError("cannot be read") from None
    assert may_pass(refused.value) is passes


def test_what_is_no_fault_of_a_file() -> None:
    assert not may_pass(UserError("wrong")) and not may_pass(OSError("before the beginning"))
    assert not may_pass(SharedError("wrong")) and may_pass(ElsewhereError("rank 1: lost", passes=True))


def test_a_run_file_that_cannot_be_read_now() -> None:
    """The kernel refuses to read its first byte."""
    ended = pretrain(1, Path("/proc/self/mem"))
    assert (ended.returncode, ended.stderr) == (1, "error: /proc/self/mem: Input/output error\n")


def test_a_node_that_lost_its_file_system_is_named(tmp_path: Path, data: dict) -> None:
    """The other ranks wait for it; they are not to blame."""
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    names = {FAILED_NODES: str(tmp_path / "failed"), "JETMOE_NODE": "node1"}
    with patch.dict(os.environ, names):
        first, other = training(run_file, before=stale_data_on_rank_1).to_their_ends(2)
    line = f"cannot read {data['code']}.bin: Stale file handle"
    assert (other.returncode, other.stderr) == (1, f"node1: error: {line}\n")
    assert (first.returncode, first.stderr) == (4, f"error: rank 1 on node1: {line}\n")
    assert [(file.name, file.read_text()) for file in (tmp_path / "failed").iterdir()] == [("node1", line)]


def stale_data_on_rank_1() -> None:
    import jetmoe_megatron.data.checks as checks

    def stale(prefix: str) -> None:
        with reading(Path(f"{prefix}.bin")):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    if os.environ["RANK"] == "1":
        patch.object(checks, "open_index", stale).start()
