"""The errors that the user can fix, and those that may pass."""

from data_tools import errors
from data_tools.errors import InputError
from data_tools.printing import printable

__all__ = ["InputError", "SharedError", "UserError", "may_pass", "printable"]


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
    """As `data_tools.errors.may_pass`, also for what another rank met."""
    while error is not None and not isinstance(error, (OSError, SharedError)):
        error = error.__cause__ or error.__context__
    return error.passes if isinstance(error, SharedError) else errors.may_pass(error)
