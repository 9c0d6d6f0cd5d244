"""Which files the inputs of a command name, and what they hold."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from data_tools.errors import InputError

Kind = Literal["records", "parquet", "text"]

SKIPPED = ".skipped.txt"  # the end of the name of a list of broken lines; it may be in the same folder as texts
_PACKED = (".gz", ".zst")
_KINDS: dict[str, Kind] = {".jsonl": "records", ".parquet": "parquet", ".txt": "text"}


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The files that inputs name, in the order given.

    A file is taken whatever its name. A folder gives its files of JSON lines and Parquet, or of plain text, at any
    depth; a pattern (`shards/*.jsonl.gz`, `**` for any depth) gives its matches. Both are sorted by path.

    Raises:
        InputError: an input names nothing; a folder has no such files, or both text and records; a file is named
            twice, or is not a file on a disk.
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


def kind_of(path: Path) -> Kind:
    """The content of a file, judged by its name: one document (`.txt`), a table (`.parquet`), otherwise JSON lines."""
    return _kind_by_name(path) or "records"


def _kind_by_name(path: Path) -> Kind | None:
    name = path.stem if path.suffix in _PACKED else path.name
    return _KINDS.get(Path(name).suffix)


def _files_under(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: not a file on a disk; a run that was interrupted must be able to read it again")
    found = sorted(p for p in _below(path) if _kind_by_name(p) and not (p.name.endswith(SKIPPED) or p.is_dir()))
    if lost := next((p for p in found if not p.exists()), None):
        raise InputError(f"{lost}: a link to a file that is not there")
    found = [p for p in found if p.is_file()]
    texts = [p for p in found if kind_of(p) == "text"]
    if not found:
        raise InputError(f"{path}: no {', '.join(_KINDS)} file in this folder (.jsonl and .txt also as .gz or .zst)")
    if texts and len(texts) < len(found):
        raise InputError(f"{path}: holds records and also text such as {texts[0]}; name the files by a pattern")
    return found


def _below(folder: Path) -> Iterator[Path]:
    """All files at any depth, also behind links to folders, but no folder twice: links may form a circle."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(root, name) for name in names)


def _refuse_twice(files: list[Path]) -> None:
    seen = set()
    for path in files:
        where = path.resolve()
        if where in seen:
            raise InputError(f"{path}: named twice by the inputs; name each file once")
        seen.add(where)
