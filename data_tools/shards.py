"""Cut input files into the parts that workers read on their own."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_tools.errors import reading
from data_tools.inputs import kind_of
from data_tools.tables import BrokenTable, open_table

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte 0x50 to 0x5f: how pzstd's files begin (RFC 8878, section 3.1.2)
# Approximate size of a shard: the most work that is lost when a worker stops, and the most that one worker may still
# have to do when the others are done. A compressed file is one shard, however large.
SHARD_BYTES = 1 << 24


@dataclass(frozen=True)
class Shard:
    """Bytes start to end of JSON lines, or row groups start to end of a Parquet file; None: to the file's end.

    size: its bytes in the file, estimated for row groups. Those of all shards add up to the file's.
    """

    path: Path
    start: int = 0
    end: int | None = None
    size: int = 0


def cut(files: Iterable[Path]) -> Iterator[Shard]:
    """All shards of the files, in order; they depend only on the files.

    A compressed file can only be read from its start and a text is one document: each is one shard.

    Raises:
        InputError: a file cannot be read.
    """
    for path in files:
        kind = kind_of(path)
        if kind == "parquet":
            yield from _cut_parquet(path)
        elif kind == "text" or _is_packed(path):
            yield Shard(path, size=bytes_in(path))
        else:
            size = bytes_in(path)
            for start in range(0, max(size, 1), SHARD_BYTES):
                end = min(start + SHARD_BYTES, size)
                yield Shard(path, start, end, end - start)


def bytes_in(path: Path) -> int:
    """Raises InputError if the file cannot be read."""
    with reading(path):
        return path.stat().st_size


def compression(head: bytes) -> Literal["gzip", "zstd"] | None:
    """How a file with these first 4 bytes is compressed."""
    if head.startswith(_GZIP):
        return "gzip"
    if head == _ZSTD or (head[1:] == _ZSTD_SKIPPABLE and head[0] >> 4 == 5):
        return "zstd"
    return None


def _is_packed(path: Path) -> bool:
    with reading(path), open(path, "rb") as stream:
        return compression(stream.read(4)) is not None


def _cut_parquet(path: Path) -> Iterator[Shard]:
    in_file = bytes_in(path)
    try:
        metadata = open_table(path).metadata
    except (BrokenTable, OSError):
        yield Shard(path, size=in_file)  # reading it reports what is wrong
        return
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    start = before = size = told = 0
    for group, own in enumerate(sizes):
        size += own
        if size - before >= SHARD_BYTES:
            share = in_file * size // sum(sizes) - told
            yield Shard(path, start, group + 1, share)
            start, before, told = group + 1, size, told + share
    if start < metadata.num_row_groups or not metadata.num_row_groups:
        yield Shard(path, start, metadata.num_row_groups, in_file - told)
