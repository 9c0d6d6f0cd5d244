from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Something the user gave is wrong. One line that says what to change; commands exit with 2."""


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
