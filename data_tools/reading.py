"""Read the texts of a shard, batch by batch: JSON lines, Parquet or plain text, as they are or compressed."""

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from data_tools import batch
from data_tools.batch import Batch, Problem
from data_tools.errors import InputError
from data_tools.inputs import kind_of
from data_tools.parsing import decode, parse
from data_tools.printing import printable
from data_tools.shards import Shard, compression
from data_tools.tables import BrokenTable, open_table, read_row_groups

_PACKED_BYTES = 1 << 16
_LARGEST_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` makes
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_texts(shard: Shard, text_key: str) -> Iterator[Batch]:
    """Yield all texts of a shard, about 1 MiB at a time.

    A byte order mark at the start of a file is dropped, and CRLF ends a line as LF does: both give a note. An empty
    file, and one that is broken from some line on, give a problem.

    Raises:
        InputError: the file cannot be read.
    """
    readers = {"records": _records, "parquet": _table, "text": _document}
    try:
        yield from readers[kind_of(shard.path)](shard, text_key)
    except OSError as error:
        raise InputError(f"cannot read {shard.path}: {error.strerror or error}") from error


def locate(path: Path, before: int, number: int, message: str) -> str:
    """A problem as `file:line: what is wrong`. before: lines of the file before the shard that has the problem."""
    return printable(f"{path}:{before + number}: {message}" if number else f"{path}: {message}")


def _records(shard: Shard, text_key: str) -> Iterator[Batch]:
    number, problems = 0, []
    try:
        with open(shard.path, "rb") as raw:
            for lines in _lines(_chunks(raw, shard)):
                at_start = number == shard.start == 0
                notes = _take_marks(shard.path, lines) if at_start else []
                yield Batch(*_parsed(lines, number + 1, text_key), notes)
                number += len(lines)
    except _BrokenStream as error:
        problems.append((number + 1, f"{error}; lost from here on"))
    if number == shard.start == 0 and not problems and shard.end in (None, 0):
        problems.append((0, "the file is empty"))
    if problems:
        yield Batch([], 0, problems)


def _parsed(lines: list[bytes], first: int, text_key: str) -> tuple[list[str], int, list[Problem]]:
    texts, problems = parse(lines, first, text_key)
    return texts, len(lines), problems


def _take_marks(path: Path, lines: list[bytes]) -> list[str]:
    notes = []
    if lines[0].startswith(_BYTE_ORDER_MARK):
        notes.append(f"{path}:1: byte order mark ignored")
        lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
    if lines[0].endswith(b"\r"):
        notes.append(f"{path}:1: CRLF line ends, read like LF")
    return notes


def _document(shard: Shard, text_key: str) -> Iterator[Batch]:
    notes = []
    try:
        with open(shard.path, "rb") as raw:
            content = b"".join(_chunks(raw, shard))
        if content.startswith(_BYTE_ORDER_MARK):
            notes.append(f"{shard.path}:1: byte order mark ignored")
            content = content.removeprefix(_BYTE_ORDER_MARK)
        if not content:
            yield Batch([], 0, [(0, "the file is empty")], notes)
        else:
            yield Batch([decode(content)], 1, [], notes)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Batch([], 1, [(line, f"not valid UTF-8: {error.reason}; the whole text is left out")], notes)
    except ValueError as error:
        yield Batch([], 1, [(0, f"{error}; the whole text is left out")], notes)


def _table(shard: Shard, text_key: str) -> Iterator[Batch]:
    try:
        table = open_table(shard.path)
    except BrokenTable as error:
        yield Batch([], 0, [(0, f"not readable as Parquet ({error}); the whole file is left out")])
        return
    groups = range(shard.start, table.metadata.num_row_groups if shard.end is None else shard.end)
    yield from read_row_groups(table, groups, text_key)


class _BrokenStream(ValueError):
    """A file that cannot be read to its end."""


def _chunks(raw: IO[bytes], shard: Shard) -> Iterator[bytes]:
    """The content of a file, or the lines that begin in a part of it."""
    head = raw.peek(4)[:4] if hasattr(raw, "peek") else b""
    if method := compression(head):
        yield from _unpacked(raw, method)
    else:
        yield from _part(raw, shard)


def _unpacked(raw: IO[bytes], method: str) -> Iterator[bytes]:
    """Decompress member after member. What comes before damage is yielded before the error is raised."""
    decoder: Any = None
    try:
        while packed := raw.read(_PACKED_BYTES):
            while packed:
                if decoder is None:
                    if method == "gzip" and not (packed := packed.lstrip(b"\0")):  # padding, as gzip itself allows
                        break
                    decoder = _decoder(method)
                yield decoder.decompress(packed)
                if not decoder.eof:
                    break
                packed, decoder = decoder.unused_data, None
    except (zlib.error, zstandard.ZstdError) as error:
        raise _BrokenStream(f"the {method} stream is broken ({error})") from error
    if decoder is not None:
        raise _BrokenStream(f"the {method} stream ends early")


def _decoder(method: str) -> Any:
    if method == "gzip":
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor(max_window_size=_LARGEST_ZSTD_WINDOW).decompressobj()


def _part(raw: IO[bytes], shard: Shard) -> Iterator[bytes]:
    position, end = shard.start, shard.end
    if position:
        position = _next_line(raw, position, end)
    chunk = b""
    while end is None or position < end:
        chunk = raw.read(batch.BATCH_BYTES if end is None else min(batch.BATCH_BYTES, end - position))
        if not chunk and end is not None:
            raise _BrokenStream("the file became shorter while it was read")
        if not chunk:
            return
        position += len(chunk)
        yield chunk
    if chunk and not chunk.endswith(b"\n"):
        yield raw.readline()


def _next_line(raw: IO[bytes], position: int, end: int | None) -> int:
    """Move to the first line that begins at position or later, but not beyond end. Returns the new position."""
    raw.seek(position - 1)
    while line := raw.readline(batch.BATCH_BYTES):
        if line.endswith(b"\n") or (end is not None and raw.tell() >= end):
            break
    return raw.tell()


def _lines(chunks: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Whole lines, without their LF, of a stream of bytes."""
    pieces: list[bytes] = []
    for chunk in chunks:
        cut = chunk.rfind(b"\n")
        if cut < 0:
            pieces.append(chunk)
            continue
        yield b"".join([*pieces, chunk[:cut]]).split(b"\n")
        pieces = [chunk[cut + 1 :]]
    if last := b"".join(pieces):
        yield [last]
