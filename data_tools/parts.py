"""Tokenizing in parts, on several machines: which files are whose, and that all parts mean the same inputs.

The parts of PREFIX are the datasets `PREFIX.part-K-of-N`, K from 1. Merged in order, they have the bytes of one
machine's dataset.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.atomic import sync, temporary_path
from data_tools.errors import InputError, reading, writing
from data_tools.partial import difference


class PartIsComplete(Exception):
    """The part is there, made from the same inputs with the same settings."""


@dataclass(frozen=True)
class Part:
    """Part `number` of `parts`, counted from 1."""

    number: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """K/N. Raises InputError."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"--part {text}: write K/N, as 1/8 for the first of eight parts, with K from 1 to N")
        return cls(int(match[1]), int(match[2]))

    def prefix(self, whole: str | Path) -> str:
        """Of this part of a dataset."""
        return f"{whole}.part-{self.number}-of-{self.parts}"

    def of(self, files: Sequence[Path]) -> Sequence[Path]:
        """The files of this part. Raises InputError: there are fewer files than parts."""
        check_parts(self.parts, files)
        sizes = []
        for path in files:
            with reading(path):
                sizes.append(path.stat().st_size)
        ends = split(sizes, self.parts)
        return files[ends[self.number - 1] : ends[self.number]]


def check_parts(parts: int, files: Sequence[Path]) -> None:
    """Raises InputError: parts are whole files, and some part would have none."""
    if not 1 <= parts <= len(files):
        most = "only 1 part is possible" if len(files) == 1 else f"use 1 to {len(files)} parts, or split the files"
        raise InputError(f"{parts} parts of {len(files)} input files: a part has whole files; {most}")


def split(sizes: Sequence[int], parts: int) -> list[int]:
    """Cut a list into contiguous parts, none of them empty, so that the largest is as small as it can be.

    sizes: at least as many as parts. Returns where each part begins, and the end: [parts + 1].
    """
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(sizes, middle, 0)) <= parts + 1:
            high = middle
        else:
            low = middle + 1
    return _filled(sizes, low, parts)


def _filled(sizes: Sequence[int], most: int, parts: int) -> list[int]:
    """Cut where the next size would make a part larger than `most`, or leave less than one for each of `parts`."""
    ends, filled = [0], 0
    for number, size in enumerate(sizes):
        too_few_left = len(sizes) - number <= parts - len(ends)
        if number and (filled + size > most or too_few_left):
            ends.append(number)
            filled = 0
        filled += size
    return [*ends, len(sizes)]


def agree(whole: str | Path, settings: dict[str, Any]) -> None:
    """Compare the settings, with all inputs, with those of the part that began first, which leaves them in a file.

    Raises:
        InputError: they differ, so that the parts would not fit together.
    """
    path = Path(f"{whole}.part-settings.json")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = temporary_path(path)
        try:
            with open(aside, "xb") as stream:
                stream.write(json.dumps(settings).encode())
                sync(stream)
            os.link(aside, path)  # unlike a rename, it fails if another part was first
        except FileExistsError:
            pass
        finally:
            aside.unlink(missing_ok=True)
    with reading(path):
        first = path.read_bytes()
    try:
        differ = difference(json.loads(first), settings)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read; delete {whole}.part-* and start all parts again") from error
    if differ:
        raise InputError(
            f"another part of {whole} has {differ}; use the same inputs and settings, or delete {whole}.part-* and "
            "start all parts again"
        )
