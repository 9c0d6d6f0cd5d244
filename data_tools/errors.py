"""The error for wrong input, and the line that a command prints for an error."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.printing import printable

# What can be wrong with a path that the user named. Any other one is a fault of a machine or of a file system.
_OF_THE_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.ENXIO,
    errno.EPERM,
    errno.EROFS,
}


class InputError(ValueError):
    """The user's input is wrong. The message is one line that says what to change; commands exit with status 2."""


def one_line(error: Exception) -> str:
    """An error as one line to print. Line ends and control characters, as in a file name, are spelled out.

    An OSError that names a file counts as wrong input; any other OSError is raised again.
    """
    if isinstance(error, OSError):
        if error.filename is None:
            raise error
        error = InputError(f"{error.filename}: {error.strerror}")
    return printable(str(error))


def may_pass(error: BaseException | None) -> bool:
    """Whether an OSError that is no fault of the input led to the error, such as an I/O error or a full disk: the same
    command may succeed later."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error is not None and bool(error.errno) and error.errno not in _OF_THE_PATH


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into an InputError: path cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into an InputError: path cannot be read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
