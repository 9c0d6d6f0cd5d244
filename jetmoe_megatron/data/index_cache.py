"""Arrays that are costly to build, kept on disk: a folder of .npy files per key, which appears when it is complete.

No pickled array is ever read.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_tools.atomic import sync, temporary_path
from jetmoe_megatron.errors import UserError

Build = Callable[[], dict[str, np.ndarray]]


class IndexCache:
    def __init__(self, root: Path, report: Callable[[str], None] = lambda line: None, from_seconds: float = 0) -> None:
        """report: gets a line for each key whose build took `from_seconds` or more."""
        self.root, self.report, self.from_seconds = root, report, from_seconds

    def __contains__(self, key: str) -> bool:
        return (self.root / key).is_dir()

    def add(self, key: str, build: Build) -> None:
        """Build the key if it is missing. One process per cache folder calls it; a second one would do no harm."""
        if key in self:
            return
        path = self.root / key
        aside = temporary_path(path)
        started = time.perf_counter()
        try:
            arrays = build()
            aside.mkdir(parents=True)
            for name, array in arrays.items():
                with open(aside / f"{name}.npy", "wb") as stream:
                    np.save(stream, array, allow_pickle=False)
                    sync(stream)
            os.rename(aside, path)
            seconds = time.perf_counter() - started
            if seconds >= self.from_seconds:
                self.report(f"built {path} in {seconds:.1f} s")
        except MemoryError as error:
            raise UserError(f"data.cache: {path} does not fit into memory: {error}") from error
        except OSError as error:
            if key not in self:
                raise UserError(f"data.cache: cannot write {path}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def read(self, key: str, name: str, *shape: int) -> np.ndarray:
        """A mapped array of integers. Raises UserError if it is missing, damaged, pickled or of another shape."""
        path = self.root / key / f"{name}.npy"
        try:
            if not path.is_file():  # opening a pipe would block
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            array = np.lib.format.open_memmap(path, mode="r")
            if array.dtype.kind not in "iu" or array.shape != shape:
                raise ValueError(f"{array.dtype} {list(array.shape)} instead of integers {list(shape)}")
            return array
        except (OSError, ValueError, EOFError, MemoryError, RecursionError) as error:
            raise self.damage(key, name, str(error)) from error

    def damage(self, key: str, name: str, what: str) -> UserError:
        path = self.root / key / f"{name}.npy"
        return UserError(f"data.cache: {path} is damaged: delete {path.parent} ({what})")

    def check_values(self, key: str, name: str, values: np.ndarray, end: int) -> None:
        """Raises UserError unless all values, which are about to be used, are from 0 up to, not including, `end`."""
        if len(values) and not 0 <= values.min() <= values.max() < end:
            raise self.damage(key, name, f"values that are not from 0 to {end - 1}")
