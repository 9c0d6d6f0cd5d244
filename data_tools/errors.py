"""What a command says when something the user gave is wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.printing import printable


class InputError(ValueError):
    """Something the user gave is wrong. One line that says what to change; commands exit with 2."""


def one_line(error: Exception) -> str:
    """What a command says of an error. Line ends and the like, which the name of a file may hold, are spelled out.

    An OSError is the user's where it is about a file; one that is not is raised again.
    """
    if isinstance(error, OSError):
        if error.filename is None:
            raise error
        error = InputError(f"{error.filename}: {error.strerror}")
    return printable(str(error))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside is an InputError: path cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """An OSError inside is an InputError: path cannot be read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
