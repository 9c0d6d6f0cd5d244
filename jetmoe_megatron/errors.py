"""Exit statuses of a run, and the errors that are the user's to mend."""

from data_tools.errors import InputError
from data_tools.printing import printable

__all__ = ["InputError", "SharedError", "UserError", "printable"]

EXIT_NOT_SAVED = 1  # trained, but the last checkpoint could not be written
EXIT_BAD_INPUT = 2
EXIT_BAD_STEPS = 3  # the loss guard has stopped the run: run again, it would do the same
EXIT_LOST_RANKS = 4  # another rank died or hangs, and this one, or one that waited with it, has named it
EXIT_RUN_ME_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: stopped on a signal after saving


class UserError(InputError):
    """Something in a run file, or in what it names, is wrong. One line that says what to change."""


class SharedError(UserError):
    """All ranks raise it at the same place: one of them is enough to say it."""
