"""Which files the inputs of a command name."""

import glob
from collections.abc import Iterable
from pathlib import Path

from data_tools.errors import InputError

_SUFFIXES = (".jsonl", ".jsonl.gz")


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The files that inputs name, in the order given.

    A file is taken as it is, whatever its name; a folder gives its `.jsonl` and `.jsonl.gz` files at any
    depth, a pattern (`shards/*.jsonl.gz`, `**` for any depth) its matches, both sorted by path.

    Raises:
        InputError: an input names nothing, a folder holds no JSON lines, or a file is named twice.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.exists():
            files += _files_under(path)
            continue
        matches = sorted(glob.glob(str(name), recursive=True))
        if not matches:
            raise InputError(f"{name}: no such file or folder, and no file matches it as a pattern")
        for match in matches:
            files += _files_under(Path(match))
    _refuse_twice(files)
    return files


def _files_under(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file())
    if not found:
        raise InputError(f"{path}: no {' or '.join(_SUFFIXES)} file in this folder")
    return found


def _refuse_twice(files: list[Path]) -> None:
    seen = set()
    for path in files:
        where = path.resolve()
        if where in seen:
            raise InputError(f"{path}: named twice by the inputs; name each file once")
        seen.add(where)
