"""The errors that are the user's to mend."""

from data_tools.errors import InputError
from data_tools.printing import printable

__all__ = ["InputError", "SharedError", "UserError", "printable"]


class UserError(InputError):
    """Something in a run file, or in what it names, is wrong. One line that says what to change."""


class SharedError(UserError):
    """All ranks raise it at the same place: one of them is enough to say it."""
