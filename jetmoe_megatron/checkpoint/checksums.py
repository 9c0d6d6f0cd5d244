"""Checksums of every file of a checkpoint: is it whole?"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from data_tools.progress import OnProgress, no_progress
from jetmoe_megatron.checkpoint.folder import newest, published
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.errors import UserError

CHECKSUMS = "checksums.json"  # of all other files: {name: [bytes, sha256]}; written last
COMPANIONS = "hf"  # in a checkpoint made from a Hugging Face model: its config and tokenizer; others have no folder
METADATA = ".metadata"  # torch.distributed.checkpoint's, a pickle
_READ = (METADATA, "common.pt", "metadata.json", "run.yaml", "progress.json", "model.yaml")
_SMALL = 2**20  # bytes; a quick check reads files up to this size
_BLOCK = 2**22
_Name = Annotated[str, Field(pattern=rf"^({COMPANIONS}/)?[^/\p{{C}}\p{{Zl}}\p{{Zp}}]+$")]  # printable in a line
# A file that is missing, or is not a file, is damage. One that cannot be read now may be whole.
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_List = TypeAdapter(dict[_Name, tuple[Annotated[int, Field(ge=0)], str]])


def checksum(path: Path, read: Callable[[int], None] = lambda count: None) -> tuple[int, str]:
    """(bytes, sha256). read: gets the bytes of each block that was read."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            read(len(block))
        return stream.tell(), digest.hexdigest()


def write_checksums(
    checkpoint: Path, known: Mapping[str, tuple[int, str]] | None = None, without: Collection[str] = ()
) -> None:
    """Write the list of all files.

    Args:
        known: checksums that were computed when their files were written.
        without: files that will be gone when the checkpoint is whole.
    """
    sums, left_out = dict(known or {}), {CHECKSUMS, *without}
    for path in checkpoint.rglob("*"):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_file() and name not in {*sums, *left_out}:
            sums[name] = checksum(path)
    (checkpoint / CHECKSUMS).write_text(json.dumps(dict(sorted(sums.items())), indent=1))


def listed_files(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """
    Raises:
        ValueError: with a short reason, if the list is missing or damaged.
        OSError: it cannot be read.
    """
    try:
        if not _is_plain(checkpoint / CHECKSUMS):
            raise ValueError("not a file")
        return _List.validate_json((checkpoint / CHECKSUMS).read_bytes(), strict=True)
    except (*_ABSENT, ValueError):
        raise ValueError(f"{CHECKSUMS} is missing or damaged") from None


def find_damage(
    checkpoint: Path, share: tuple[int, int] = (0, 1), quick: bool = False, progress: OnProgress = no_progress
) -> str | None:
    """What is wrong with the first bad file, in a few words; None if there is none.

    Args:
        share: (n, of): look at every `of`-th file from the n-th on, so that ranks can divide the work.
        quick: names, sizes and small files only.
        progress: gets the bytes of the share, read and in all.

    Raises:
        OSError: a file cannot be read, which says nothing about its content.
    """
    try:
        files = listed_files(checkpoint)
    except ValueError as error:
        return str(error)
    if METADATA not in files:
        return f"{METADATA} is not in {CHECKSUMS}"
    if wrong := _unlisted(checkpoint, files):
        return wrong
    own = sorted(files.items())[share[0] :: share[1]]
    done, total = 0, sum(size for _, (size, _) in own)

    def read(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for name, (size, digest) in own:
        path = checkpoint / name
        try:
            if not _is_plain(path):
                return f"{name} is not a file"
            if (found := path.stat().st_size) != size:
                return f"{name} has {found} bytes instead of {size}"
            if not (quick and size > _SMALL) and checksum(path, read) != (size, digest):
                return f"{name} is not what was written (its checksum differs)"
        except OSError as error:
            if not isinstance(error, _ABSENT) and error.errno != errno.ENAMETOOLONG:
                raise
            return f"{name}: {error.strerror}"
    return None


def find_damage_by_threads(checkpoint: Path) -> str | None:
    """`find_damage` of all files, on several cores of one process."""
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda number: find_damage(checkpoint, share=(number, threads)), range(threads)))
    return next(filter(None, found), None)


def _unlisted(checkpoint: Path, files: Collection[str]) -> str | None:
    """A problem if a file that would be read or copied is not in the list."""
    companions = checkpoint / COMPANIONS
    if companions.is_symlink():
        return f"{COMPANIONS} is not a folder but a link"
    read = [path.name for path in checkpoint.iterdir() if _is_read(path.name)]
    read += [f"{COMPANIONS}/{path.name}" for path in (companions.iterdir() if companions.is_dir() else ())]
    return next((f"{name} is not in {CHECKSUMS}" for name in sorted(read) if name not in files), None)


def not_a_file(checkpoint: Path) -> str | None:
    """A problem if something that would be read is a folder or a pipe, for a checkpoint that has no list."""
    read = sorted(path for path in checkpoint.iterdir() if _is_read(path.name))
    return next((f"{path.name} is not a file" for path in read if not path.is_file()), None)


def _is_plain(path: Path) -> bool:
    """Whether it is a regular file. Reading a pipe would block, and a link leads outside."""
    return stat.S_ISREG(path.lstat().st_mode)


def _is_read(name: str) -> bool:
    """Whether loading a checkpoint reads a file of that name."""
    return name in _READ or name.endswith(".distcp")


def newest_whole(root: Path) -> Path | None:
    """The newest whole checkpoint of a run, as far as names, sizes and small files tell."""
    return next((path for path in reversed(published(root)) if find_damage(path, quick=True) is None), None)


def newest_whole_of(path: Path) -> tuple[Path, str | None]:
    """The newest whole checkpoint of a run folder, and a warning if a newer one is damaged; any other path as it is.

    Raises:
        UserError: none of its checkpoints is whole.
    """
    root = RunFolder(path).checkpoints
    last, whole = newest(root), newest_whole(root)
    if last is None or last == whole:
        return last or path, None
    damage = f"{last} is damaged: {find_damage(last, quick=True)}"
    if whole is None:
        raise UserError(f"{damage}; no whole checkpoint is left")
    return whole, f"{damage}; taking {whole.name}"
