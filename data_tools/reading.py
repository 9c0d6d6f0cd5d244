"""Read JSON lines, plain or gzipped, into batches of raw lines. Parsing them is left to the workers."""

import gzip
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.errors import InputError

# Bounds what is in flight: a batch is closed once its lines reach this many bytes.
_BATCH_BYTES = 1 << 18
_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Report = Callable[[str], None]


def report_to_stderr(message: str) -> None:
    """Print one line for a person to read."""
    print(message, file=sys.stderr)


@dataclass(frozen=True)
class Batch:
    """Neighbouring lines of one file. problems: what is wrong with the file after them, one line each."""

    path: Path
    first_line: int
    lines: list[bytes]
    problems: list[str] = field(default_factory=list)


def read_batches(files: Iterable[Path], report: Report = report_to_stderr) -> Iterator[Batch]:
    """Yield the lines of all files in order, about 256 KiB at a time; no batch spans two files.

    A byte order mark at the start of a file is dropped; it and CRLF line ends change no text, so they are
    only reported. An empty file and a broken gzip stream are `problems` of the file's last batch.

    Raises:
        InputError: a file cannot be read.
    """
    for path in files:
        try:
            with open(path, "rb") as raw:
                packed = raw.peek(2).startswith(_GZIP_MAGIC)
                yield from _batches_of(path, gzip.GzipFile(fileobj=raw) if packed else raw, report)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _batches_of(path: Path, stream: Iterable[bytes], report: Report) -> Iterator[Batch]:
    number, first, size = 0, 1, 0
    lines: list[bytes] = []
    problems: list[str] = []
    try:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = _without_marks(path, line, report)
            lines.append(line)
            size += len(line)
            if size >= _BATCH_BYTES:
                yield Batch(path, first, lines)
                first, lines, size = number + 1, [], 0
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problems.append(f"{path}:{number + 1}: the gzip stream is broken from here on ({error})")
    if number == 0 and not problems:
        problems.append(f"{path}: the file is empty")
    if lines or problems:
        yield Batch(path, first, lines, problems)


def _without_marks(path: Path, line: bytes, report: Report) -> bytes:
    if line.startswith(_BYTE_ORDER_MARK):
        report(f"note: {path}:1: byte order mark ignored")
        line = line[len(_BYTE_ORDER_MARK) :]
    if line.endswith(b"\r\n"):
        report(f"note: {path}:1: CRLF line ends, read like LF")
    return line
