"""A lock that another process holds, that the file system does not have, and that fails are three things."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from data_tools.locks import is_locked, open_locked


def test_only_one_process_has_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = open_locked(path)
    assert first and open_locked(path) is None
    first.close()
    with open_locked(path) as again:  # type: ignore[union-attr]
        assert again.writable()


def flock_fails_with(number: int) -> Any:
    def flock(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    return patch.object(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_lets_all_in(number: int, tmp_path: Path) -> None:
    with flock_fails_with(number):
        assert open_locked(tmp_path / "lock") and open_locked(tmp_path / "lock")


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN])
def test_another_process_holds_it(number: int, tmp_path: Path) -> None:
    with flock_fails_with(number):
        assert open_locked(tmp_path / "lock") is None


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADF, errno.EINVAL])
def test_other_errors_are_not_taken_for_a_lock(number: int, tmp_path: Path) -> None:
    with flock_fails_with(number), pytest.raises(OSError, match="cannot be locked") as caught:
        open_locked(tmp_path / "lock")
    assert caught.value.filename == str(tmp_path / "lock") and caught.value.errno == number


def test_nfs_can_lock_it(tmp_path: Path) -> None:
    """NFS makes of flock a lock of fcntl, which for LOCK_EX must be open for writing (flock(2))."""
    locked: list[Any] = []
    with patch.object(fcntl, "flock", lambda file, operation: locked.append(fcntl.lockf(file, operation))):
        assert open_locked(tmp_path / "lock")
    assert locked == [None]


def test_a_removed_lock_is_not_taken_for_the_lock(tmp_path: Path) -> None:
    """The process that held it removed it between this one's opening and locking."""
    path, real = tmp_path / "lock", fcntl.flock

    def remove_first(file: Any, operation: int) -> None:
        real(file, operation)
        if not removed:
            removed.append(path.unlink())

    removed: list[None] = []
    with patch.object(fcntl, "flock", remove_first):
        mine = open_locked(path)
    assert mine and open_locked(path) is None


def test_a_lock_is_asked_for_without_making_or_holding_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path) and not path.exists()
    held = open_locked(path)
    assert held and is_locked(path)
    held.close()
    assert not is_locked(path)
    again = open_locked(path)
    assert again
    again.close()
    with flock_fails_with(errno.ENOLCK):
        assert not is_locked(path)
    with flock_fails_with(errno.EIO), pytest.raises(OSError, match="cannot be locked"):
        is_locked(path)
