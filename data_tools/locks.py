"""Files that one process at a time may hold. They stand for the folders that one process at a time may work in."""

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

# A file system without locks: others find out the same, so all are let in.
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}


def open_locked(path: Path) -> IO[bytes] | None:
    """Make a file if it is missing, and lock it until it is closed, at the latest at the end of the process.

    It is open for writing, which NFS demands of a lock; so it cannot be the folder itself. Who removes the file does so
    before closing it.

    Returns:
        None if another process has locked it. The open file also if the file system has no locks.

    Raises:
        OSError: with the file's name.
    """
    while True:
        file = open(path, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                file.close()
                return None
            if error.errno not in _NO_LOCKS:
                file.close()
                raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from None
        if _is_at(path, file):
            return file
        file.close()  # the process that held it has just removed it


def is_locked(path: Path) -> bool:
    """Whether a process holds it. Nothing is made or changed.

    Raises:
        OSError: with the file's name.
    """
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from None
    return False


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
