"""metrics.jsonl and routers.jsonl: never two lines for a step, also after kills and resumes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from data_tools.atomic import replacing
from data_tools.errors import reading
from data_tools.progress import above
from jetmoe_megatron.monitor.monitor import Record

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JsonLines:
    """While the disk is full, lines wait in memory. They are written when there is room again."""

    def __init__(self, path: Path, resume_after_step: int) -> None:
        """Drops lines of steps after `resume_after_step`, which will be run again, and a line cut off by a kill.

        Raises:
            OSError, InputError: the file cannot be written, for another reason than a full disk, or not be read.
        """
        self.path, self.waiting = path, b""
        self.file: FileIO | None = None
        self._amended: tuple[int, Record] | None = None  # values that wait to be added to a step's line
        self._warned = False
        self._end = _end_of(path, resume_after_step)
        self._try()

    def write(self, record: Record) -> None:
        before = self.waiting
        self.waiting += _line(record)
        try:
            self._try()
        except OSError:
            self.waiting = before  # the monitor brings it again
            raise

    def amend(self, step: int, values: Record) -> None:
        """Add values to a step's existing line."""
        self._amended = (step, values)
        self._try()

    def close(self) -> None:
        """Raises OSError if lines are lost."""
        try:
            self._flush()
        except OSError as error:
            lost = self.waiting.count(b"\n") + bool(self._amended)
            raise OSError(error.errno, f"{self.path}: {error.strerror}: {lost} lines are lost") from None
        finally:
            if self.file:
                self.file.close()

    def _try(self) -> None:
        try:
            self._flush()
            self._warned = False
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            if not self._warned:
                above(f"warning: {self.path}: {error.strerror}: lines wait in memory", sys.stderr)
            self._warned = True

    def _flush(self) -> None:
        if self.file is None:
            file = open(self.path, "ab", buffering=0)
            file.truncate(self._end)
            self.file = file
        if self._amended:
            step, values = self._amended
            write_records(self.path, (r | values if r["step"] == step else r for r in each_record(self.path)))
            self.file.close()
            self.file, self._amended = open(self.path, "ab", buffering=0), None
        whole = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(self.waiting) < len(self.waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.waiting = b""
        except OSError:
            with contextlib.suppress(OSError):
                self.file.truncate(whole)  # removes half a line
            raise


class MetricsLines(JsonLines):
    """metrics.jsonl: all but the line of routers.jsonl."""

    def write(self, record: Record) -> None:
        super().write({key: value for key, value in record.items() if key != "routers"})


class RouterLines(JsonLines):
    """routers.jsonl."""

    def write(self, record: Record) -> None:
        if "routers" in record:
            super().write(record["routers"])

    def amend(self, step: int, values: Record) -> None:
        """Nothing is added to these lines."""


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace the file by one line for each record. After a kill or an OSError it has its old content.

    The records may come from a generator that reads the same file.
    """
    with replacing(path) as file:
        file.writelines(_line(record) for record in records)


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _end_of(path: Path, step: int) -> int:
    """Where the lines of steps up to `step` end, in bytes."""
    end = 0
    for position, record in lines_from(path):
        if record and record["step"] > step:
            break
        end = position if record else end
    return end


def each_record(path: Path) -> Iterator[dict[str, Any]]:
    """The valid records of the file, if it exists, one at a time. Cut-off and broken lines are left out."""
    return (record for _, record in lines_from(path) if record)


def last_records(path: Path, most_bytes: int = 2**20) -> list[dict[str, Any]]:
    """The valid records among the last so many bytes of the file, if it exists."""
    size = path.stat().st_size if path.is_file() else 0
    return [record for _, record in lines_from(path, max(0, size - most_bytes)) if record]


def lines_from(path: Path, position: int = 0) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(where it ends, its record or None if it is broken), from a position on. Raises InputError if the file cannot be
    read, and so do all functions that read it."""
    if not path.is_file():
        return
    with reading(path), open(path, "rb") as lines:
        lines.seek(position)
        for line in lines:
            position += len(line)
            try:
                record = json.loads(line.decode("utf-8", errors="replace"))
            except (ValueError, RecursionError):
                record = None
            valid = isinstance(record, dict) and isinstance(record.get("step"), int) and line.endswith(b"\n")
            valid = valid and _is_shallow(record)
            yield position, record if valid else None


def _is_shallow(value: dict[str, Any] | list[Any], levels: int = 4) -> bool:
    """Whether the value is nested no deeper than what is written here. A deeper one could be read but not written."""
    inner = value.values() if isinstance(value, dict) else value
    return not inner or (
        levels > 1 and all(_is_shallow(entry, levels - 1) for entry in inner if isinstance(entry, (dict, list)))
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All of `each_record`."""
    return list(each_record(path))
