"""The errors that the user can fix."""

from data_tools.errors import InputError
from data_tools.printing import printable

__all__ = ["InputError", "SharedError", "UserError", "printable"]


class UserError(InputError):
    """A run file, or a file that it names, is wrong. The message is one line that says what to change."""


class SharedError(UserError):
    """All ranks raise it at the same place, so one rank per node prints it."""
