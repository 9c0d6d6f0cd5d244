"""Where a command may write a dataset."""

from collections.abc import Iterable
from pathlib import Path

from data_tools.errors import InputError
from data_tools.indexed import bin_path, idx_path


def check_output(prefix: str | Path, inputs: Iterable[str | Path], overwrite: bool) -> None:
    """Check an output before any work starts.

    Raises:
        InputError: it is one of the inputs, it exists and overwrite is not set, or it names a folder.
    """
    if not str(prefix) or str(prefix).endswith("/"):
        raise InputError(f"the output {str(prefix)!r} names no file; give a prefix such as data/web")
    for source in inputs:
        if bin_path(source).resolve() == bin_path(prefix).resolve():
            raise InputError(f"{prefix}: both an input and the output; choose another output")
    for path in (bin_path(prefix), idx_path(prefix)):
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists; choose another output or pass --overwrite")
