"""Megatron's indexed dataset on disk: `PREFIX.bin` holds token ids, `PREFIX.idx` says where documents begin.

The layout of the index, from megatron/core/datasets/indexed_dataset.py (`_IndexWriter.write`): little-endian,
for S sequences and D documents:

    9 bytes  magic               int32[S]      tokens in each sequence
    uint64   version, 1          int64[S]      byte offset of each sequence in .bin
    uint8    code of the dtype   int64[D + 1]  first sequence of each document, then S
    uint64   S
    uint64   D + 1

Most datasets have one sequence per document; datasets that were split into sentences have several.
"""

import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from data_tools.atomic import sync, temporary_path
from data_tools.errors import InputError, reading, writing

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
# Megatron's DType enumeration.
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# Entries of an index, or token ids, in memory at a time: a dataset may have billions of either.
_CHUNK = 1 << 20
_COPY_BYTES = 1 << 22


def bin_path(prefix: str | Path) -> Path:
    """The file of token ids."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index."""
    return Path(f"{prefix}.idx")


def smallest_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """As Megatron's `DType.optimal_dtype`: uint16 for fewer than 65500 ids, int32 for more."""
    return np.uint16 if vocab_size < 65500 else np.int32


def write_index(stream: IO[bytes], dtype: np.dtype, lengths: np.ndarray, bounds: np.ndarray | None = None) -> None:
    """Write an index, chunk by chunk, so that the arrays may be mapped from files larger than memory.

    lengths: [S] int32, tokens of each sequence; bounds: [D + 1] int64, first sequence of each document, then S;
    without bounds, every sequence is a document.
    """
    sequences = len(lengths)
    ends = sequences + 1 if bounds is None else len(bounds)
    stream.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[dtype], sequences, ends))
    for start in range(0, sequences, _CHUNK):
        stream.write(lengths[start : start + _CHUNK].data)
    offset = 0
    for start in range(0, sequences, _CHUNK):
        offsets = offset + np.cumsum(lengths[start : start + _CHUNK] * np.int64(dtype.itemsize))
        stream.write(np.concatenate(([offset], offsets[:-1])).data)
        offset = int(offsets[-1])
    for start in range(0, ends, _CHUNK):
        stop = min(start + _CHUNK, ends)
        stream.write((np.arange(start, stop) if bounds is None else bounds[start:stop]).data)


class IndexedWriter:
    """Writes a dataset document by document, byte for byte as Megatron's `IndexedDatasetBuilder` would.

    Memory does not grow with the dataset. If the `with` block succeeds, both files get their names, `.idx` last. If it
    raises, no new file remains and an older pair is untouched. documents, tokens: written so far.

    Raises:
        InputError: from any method, if the files cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type[np.integer]) -> None:
        self.dtype = np.dtype(dtype)
        self.documents = self.tokens = self._sequences = 0
        self._bin_path, self._idx_path = bin_path(prefix), idx_path(prefix)
        self._bin_temporary, self._idx_temporary = (
            temporary_path(self._bin_path),
            temporary_path(self._idx_path),
        )
        self._complete = False

    def __enter__(self) -> "IndexedWriter":
        folder = self._bin_path.parent
        with writing(self._bin_path):
            folder.mkdir(parents=True, exist_ok=True)
            # The content of the index is kept in files without names until it is complete.
            self._lengths: IO[bytes] = tempfile.TemporaryFile(dir=folder)
            self._bounds: IO[bytes] = tempfile.TemporaryFile(dir=folder)
            self._bounds.write(bytes(8))
            self._bin: IO[bytes] = open(self._bin_temporary, "wb")
        return self

    def add_document(self, ids: np.ndarray) -> None:
        """Append one document. ids: [tokens], any integers; ValueError if one does not fit the dtype."""
        self.add_documents(ids, [len(ids)])

    def add_documents(
        self, ids: np.ndarray, lengths: Sequence[int] | np.ndarray, sequences: np.ndarray | None = None
    ) -> None:
        """Append documents whose ids are joined.

        ids: [sum(lengths)]; lengths: tokens of each sequence; sequences: how many each document has, 1 by default.
        """
        sizes = np.asarray(lengths, np.int64)
        counts = np.ones(len(sizes), np.int64) if sequences is None else sequences
        if sizes.sum() != len(ids) or counts.sum() != len(sizes):
            raise ValueError(f"{len(ids)} ids for {counts.sum()} sequences and documents of {sizes.sum()} tokens")
        if len(sizes) and sizes.max() >= 2**31:
            raise InputError(f"{self._bin_path}: a sequence of {sizes.max()} tokens; the format ends at {2**31 - 1}")
        if ids.dtype != self.dtype and len(ids):
            limits = np.iinfo(self.dtype)
            if ids.min() < limits.min or ids.max() > limits.max:
                raise ValueError(f"token ids {ids.min()} to {ids.max()} do not fit {self.dtype}")
        with writing(self._bin_path):
            self._bin.write(np.ascontiguousarray(ids, self.dtype).data)
        self.tokens += len(ids)
        self._add_bounds(self._sequences + np.cumsum(counts))
        self._add_lengths(sizes.astype(np.int32))

    def add_index(self, index: "Index", report: Callable[[int], None] = lambda written: None) -> None:
        """Append a whole dataset of the same dtype, as Megatron's `add_index` does.

        report: gets the bytes of the .bin so far.
        """
        if index.dtype != self.dtype:
            raise ValueError(f"{index.prefix} holds {index.dtype}, not {self.dtype}")
        source = bin_path(index.prefix)
        start = self._bin.tell()
        with open(source, "rb") as stream:
            while block := stream.read(_COPY_BYTES):
                with writing(self._bin_path):
                    self._bin.write(block)
                report(self._bin.tell())
        if self._bin.tell() - start != index.tokens * self.dtype.itemsize:
            raise InputError(f"{source}: changed while it was read; run this again when it is whole")
        self.tokens += index.tokens
        first = self._sequences
        for at in range(1, index.documents + 1, _CHUNK):
            self._add_bounds(first + index.document_bounds[at : at + _CHUNK])
        for at in range(0, len(index.sequence_lengths), _CHUNK):
            self._add_lengths(index.sequence_lengths[at : at + _CHUNK])

    def complete(self) -> None:
        """Write everything to disk, so that only two renames remain for the end of the `with` block.

        The end of the block calls it too. Call it yourself if several datasets must appear together or not at all.
        """
        if self._complete:
            return
        with writing(self._idx_path), open(self._idx_temporary, "wb") as stream:
            self._lengths.flush()
            self._bounds.flush()
            lengths = _mapped(self._lengths, np.dtype(np.int32), self._sequences)
            bounds = _mapped(self._bounds, np.dtype(np.int64), self.documents + 1)
            write_index(stream, self.dtype, lengths, bounds)
            sync(stream)
        with writing(self._bin_path):
            sync(self._bin)
        self._complete = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.complete()
                self._publish()
        finally:
            for stream in (self._bin, self._lengths, self._bounds):
                with suppress(OSError):  # a full disk, already reported
                    stream.close()
            self._bin_temporary.unlink(missing_ok=True)
            self._idx_temporary.unlink(missing_ok=True)

    def _add_lengths(self, lengths: np.ndarray) -> None:
        with writing(self._idx_path):
            self._lengths.write(lengths.data)
        self._sequences += len(lengths)

    def _add_bounds(self, bounds: np.ndarray) -> None:
        with writing(self._idx_path):
            self._bounds.write(bounds.data)
        self.documents += len(bounds)

    def _publish(self) -> None:
        with writing(self._bin_path):
            self._idx_path.unlink(missing_ok=True)  # an older index must never stand beside the new .bin
            os.replace(self._bin_temporary, self._bin_path)
            os.replace(self._idx_temporary, self._idx_path)


@dataclass(frozen=True)
class Index:
    """The content of an index; its arrays are mapped from the file.

    sequence_lengths: [S] int32, in tokens; sequence_offsets: [S] int64, in bytes;
    document_bounds: [D + 1] int64, in sequences; tokens: how many fit into the size of the .bin.
    """

    prefix: str
    dtype: np.dtype
    sequence_lengths: np.ndarray
    sequence_offsets: np.ndarray
    document_bounds: np.ndarray
    tokens: int

    @property
    def documents(self) -> int:
        return len(self.document_bounds) - 1

    def map_tokens(self) -> np.ndarray:
        """The token ids, mapped: [tokens]."""
        with reading(bin_path(self.prefix)):
            return _mapped(bin_path(self.prefix), self.dtype, self.tokens)

    def token_offsets(self, first: int, last: int) -> np.ndarray:
        """Where documents first to last - 1 begin, and where the last of them ends: [last - first + 1], in tokens."""
        bounds = self.document_bounds[first : last + 1]
        offsets = np.full(len(bounds), self.tokens)
        inside = bounds < len(self.sequence_lengths)
        offsets[inside] = self.sequence_offsets[bounds[inside]] // self.dtype.itemsize
        return offsets

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each document, a million documents at a time."""
        for start in range(0, self.documents, _CHUNK):
            yield np.diff(self.token_offsets(start, min(start + _CHUNK, self.documents)))

    def document_ranges(self) -> Iterator[tuple[int, int]]:
        """Cut the documents into ranges [first, last) of about a million tokens, or of one longer document."""
        for start in range(0, self.documents, _CHUNK):
            offsets = self.token_offsets(start, min(start + _CHUNK, self.documents))
            first = 0
            while first < len(offsets) - 1:
                end = int(np.searchsorted(offsets, offsets[first] + _CHUNK, side="right")) - 1
                last = max(end, first + 1)
                yield start + first, start + last
                first = last

    def problem_at_end(self) -> str | None:
        """A problem if the .bin does not end where the last sequence ends. The index is not read as a whole."""
        if not len(self.sequence_lengths):
            return None
        end = int(self.sequence_offsets[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        problem = _wrong_size(bin_path(self.prefix), end)
        return f"{problem}, where the last sequence of its index ends" if problem else None

    def problems(self) -> Iterator[str]:
        """Compare the index with itself and with the size of the .bin: one line for each kind of damage."""
        path, data = idx_path(self.prefix), bin_path(self.prefix)
        negative, displaced, disordered = Fault(), Fault(), Fault()
        sequences, tokens = len(self.sequence_lengths), 0
        if sequences:
            displaced.add(0, self.sequence_offsets[:1] != 0)
        for start in range(0, sequences, _CHUNK):
            lengths: np.ndarray = self.sequence_lengths[start : start + _CHUNK].astype(np.int64)
            offsets = self.sequence_offsets[start : start + _CHUNK + 1]
            negative.add(start, lengths < 0)
            displaced.add(start + 1, np.diff(offsets) != (lengths * self.dtype.itemsize)[: len(offsets) - 1])
            tokens += int(lengths.sum())
        for start in range(0, self.documents, _CHUNK):
            bounds = self.document_bounds[start : start + _CHUNK + 1]
            disordered.add(start + 1, bounds[1:] < bounds[:-1])

        for fault, total, what in (
            (negative, sequences, "negative lengths at {} sequences, first at sequence {}"),
            (displaced, sequences, "sequence lengths and byte offsets disagree at {} sequences, first at sequence {}"),
            (disordered, self.documents, "document bounds out of order at {} documents, first at document {}"),
        ):
            if fault.count:
                yield f"{path}: {what.format(f'{fault.count} of {total}', fault.first)}"
        begin, end = int(self.document_bounds[0]), int(self.document_bounds[-1])
        if (begin, end) != (0, sequences):
            yield f"{path}: document bounds go from {begin} to {end} instead of from 0 to {sequences}, all sequences"
        if problem := _wrong_size(data, tokens * self.dtype.itemsize):
            yield f"{problem} for the {tokens} tokens of its index"


@dataclass
class Fault:
    """How often something is wrong, and where first, so that one line can report a billion places."""

    count: int = 0
    first: int = -1

    def add(self, start: int, wrong: np.ndarray) -> None:
        """wrong: [n] bool, for the places from `start` on."""
        places = np.flatnonzero(wrong)
        if len(places) and not self.count:
            self.first = start + int(places[0])
        self.count += len(places)


def read_index(prefix: str | Path) -> Index:
    """Open a dataset's index and check it against itself and against the size of `PREFIX.bin`.

    Raises:
        InputError: a file is missing, the header is not Megatron's, or the index is damaged.
    """
    index = open_index(prefix)
    for problem in index.problems():
        raise InputError(f"{problem}; the file is damaged, write it again")
    return index


def open_index(prefix: str | Path) -> Index:
    """Map `PREFIX.idx` after checking only its header and size; its content may be damaged.

    Raises:
        InputError: a file is missing, the header is not Megatron's, or the index is cut short or too long.
    """
    if "://" in str(prefix):
        raise InputError(f"{prefix}: only training reads from object storage; copy the dataset to a disk first")
    path, data = idx_path(prefix), bin_path(prefix)
    for needed in (path, data):
        with reading(needed):
            if not needed.is_file():
                raise InputError(f"{needed}: no such file; a dataset is a pair PREFIX.bin and PREFIX.idx")
    with reading(path), open(path, "rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise InputError(f"{path}: not a Megatron index (its first bytes are not {_MAGIC[:7].decode()})")
        _, version, code, sequences, bounds = _HEADER.unpack(header)
        if version != _VERSION or code not in _DTYPES:
            raise InputError(f"{path}: version {version} with dtype code {code} is unknown; write it again")
        if problem := _wrong_size(path, _HEADER.size + 12 * sequences + 8 * bounds):
            raise InputError(f"{problem} for the {sequences} sequences and {bounds} document bounds of its header")
        if not bounds:
            raise InputError(f"{path}: no document bounds, not even the end of the last one; write it again")
        dtype = _DTYPES[code]
        if dtype.kind == "f":
            raise InputError(f"{path}: holds {dtype}; token ids are integers, write it again")
        offset = _HEADER.size
        lengths = _mapped(stream, np.dtype(np.int32), sequences, offset)
        offsets = _mapped(stream, np.dtype(np.int64), sequences, offset + 4 * sequences)
        documents = _mapped(stream, np.dtype(np.int64), bounds, offset + 12 * sequences)
    with reading(data):
        return Index(str(prefix), dtype, lengths, offsets, documents, data.stat().st_size // dtype.itemsize)


def _mapped(file: Path | IO[bytes], dtype: np.dtype, count: int, offset: int = 0) -> np.ndarray:
    if not count:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, "r", offset, (count,))


def _wrong_size(path: Path, needed: int) -> str | None:
    size = path.stat().st_size
    if size == needed:
        return None
    return f"{path}: {'cut short' if size < needed else 'too long'}, {size} bytes instead of {needed}"
