"""metrics.jsonl: never two lines for a step, also after kills and resumes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from jetmoe_megatron.monitor.monitor import Record


class JsonLines:
    def __init__(self, path: Path, resume_after_step: int) -> None:
        """Drops lines of steps after `resume_after_step`, which will be run again, and a line cut off by a kill."""
        write_records(path, (r for r in each_record(path) if r["step"] <= resume_after_step))
        self.path, self.waiting = path, b""  # lines that the disk has not taken yet
        self.file = open(path, "ab", buffering=0)

    def write(self, record: Record) -> None:
        """A line that the disk refuses waits for the next step's."""
        refused_before = bool(self.waiting)
        self.waiting += json.dumps(record).encode() + b"\n"
        whole = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(self.waiting) < len(self.waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.waiting = b""
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(whole)  # of half a line
            if not refused_before:
                print(f"warning: {self.path}: {error.strerror}: its lines wait", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Raises OSError if lines are lost."""
        self.file.write(self.waiting)
        self.file.close()


def write_records(path: Path, records: Iterable[dict]) -> None:
    """One line each, all of them or, after a kill, what the file held before. They may be read from it meanwhile."""
    aside = path.with_suffix(".tmp")
    with open(aside, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)


def each_record(path: Path) -> Iterator[dict]:
    """The valid records of the file, if there is one; cut-off and broken lines are left out. One is held at a time."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def read_metrics(path: Path) -> list[dict]:
    """All of `each_record`."""
    return list(each_record(path))
