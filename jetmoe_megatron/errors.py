"""The errors that the user can fix, and those that may pass."""

import errno

from data_tools.errors import InputError
from data_tools.printing import printable

__all__ = ["InputError", "SharedError", "UserError", "may_pass", "printable"]

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


class UserError(InputError):
    """A run file, or a file that it names, is wrong. The message is one line that says what to change."""


class SharedError(UserError):
    """All ranks raise it at the same place, so one rank per node prints it.

    passes: whether the error that a rank met may pass.
    """

    def __init__(self, message: str, passes: bool = False) -> None:
        super().__init__(message)
        self.passes = passes


class ElsewhereError(SharedError):
    """Another rank met an error that may pass, and this one waited for it."""


def may_pass(error: BaseException | None) -> bool:
    """Whether an OSError that is no fault of the input led to the error, such as an I/O error or a full disk: the same
    command may succeed later."""
    while error is not None and not isinstance(error, (OSError, SharedError)):
        error = error.__cause__ or error.__context__
    if isinstance(error, SharedError):
        return error.passes
    return error is not None and bool(error.errno) and error.errno not in _OF_THE_PATH
