"""metrics.jsonl: never two lines for a step, also after kills and resumes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from pathlib import Path

from jetmoe_megatron.monitor.monitor import Record


class JsonLines:
    def __init__(self, path: Path, resume_after_step: int) -> None:
        """Drops lines of steps after `resume_after_step`, which will be run again, and a line cut off by a kill."""
        kept = [r for r in read_metrics(path) if r["step"] <= resume_after_step]
        write_records(path, kept)
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


def write_records(path: Path, records: list[dict]) -> None:
    """One line each, all of them or, after a kill, what the file held before."""
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(aside, path)


def read_metrics(path: Path) -> list[dict]:
    """The valid records of the file, if there is one; cut-off and broken lines are left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records
