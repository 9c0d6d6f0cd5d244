"""Megatron's indexed dataset on disk: `PREFIX.bin` holds token ids, `PREFIX.idx` says where documents begin.

The index as megatron/core/datasets/indexed_dataset.py (`_IndexWriter.write`) lays it out, little-endian,
for S sequences and D documents:

    9 bytes  magic               int32[S]      tokens in each sequence
    uint64   version, 1          int64[S]      byte offset of each sequence in .bin
    uint8    code of the dtype   int64[D + 1]  first sequence of each document, then S
    uint64   S
    uint64   D + 1

What is written here has one sequence per document; what is read may have several.
"""

import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from data_tools.atomic import sync, temporary_path
from data_tools.errors import InputError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
# Megatron's DType enumeration.
_DTYPES = {
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
# Sequences written to the index at a time, so that a billion documents do not need 16 GB more.
_CHUNK = 1 << 20


def bin_path(prefix: str | Path) -> Path:
    """The file of token ids."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index."""
    return Path(f"{prefix}.idx")


def smallest_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """uint16 where Megatron's `DType.optimal_dtype` takes it (fewer than 65500 ids), else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedWriter:
    """Writes a dataset document by document, byte for byte as Megatron's `IndexedDatasetBuilder` would.

    Memory holds four bytes per document, the rest is streamed. Both files appear under their names when the
    `with` block ends well, `.idx` last; when it raises, nothing stays behind and an older pair is untouched.

    Raises:
        InputError: on entry, if the files cannot be created.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type[np.integer]) -> None:
        self.dtype = np.dtype(dtype)
        self._code = _CODES[self.dtype]
        self._bin_path, self._idx_path = bin_path(prefix), idx_path(prefix)
        self._bin_temporary, self._idx_temporary = (
            temporary_path(self._bin_path),
            temporary_path(self._idx_path),
        )
        self._lengths = array("i")

    def __enter__(self) -> "IndexedWriter":
        try:
            self._bin_path.parent.mkdir(parents=True, exist_ok=True)
            self._bin: IO[bytes] = open(self._bin_temporary, "wb")
        except OSError as error:
            raise InputError(f"cannot write {self._bin_path}: {error.strerror}") from error
        return self

    def add_document(self, ids: np.ndarray) -> None:
        """Append one document. ids: [tokens], any integers; ValueError if one does not fit the dtype."""
        self.add_documents(ids, [len(ids)])

    def add_documents(self, ids: np.ndarray, lengths: list[int]) -> None:
        """Append documents that lie end to end. ids: [sum(lengths)]; lengths: tokens of each document."""
        if sum(lengths) != len(ids):
            raise ValueError(f"{len(ids)} ids for documents of {sum(lengths)} tokens")
        if ids.dtype != self.dtype and len(ids):
            limits = np.iinfo(self.dtype)
            if ids.min() < limits.min or ids.max() > limits.max:
                raise ValueError(f"token ids {ids.min()} to {ids.max()} do not fit {self.dtype}")
        self._bin.write(ids.astype(self.dtype, copy=False).tobytes())
        self._lengths.extend(lengths)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            try:
                self._bin.close()  # on a full disk this raises once more
            finally:
                self._bin_temporary.unlink(missing_ok=True)
                self._idx_temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        with open(self._idx_temporary, "wb") as stream:
            self._write_index(stream)
            sync(stream)
        sync(self._bin)
        self._idx_path.unlink(missing_ok=True)  # an older index must never stand beside the new .bin
        os.replace(self._bin_temporary, self._bin_path)
        os.replace(self._idx_temporary, self._idx_path)

    def _write_index(self, stream: IO[bytes]) -> None:
        count = len(self._lengths)
        stream.write(_HEADER.pack(_MAGIC, _VERSION, self._code, count, count + 1))
        lengths = np.asarray(self._lengths, dtype=np.int32)
        stream.write(lengths.data)
        offset = 0
        for start in range(0, count, _CHUNK):
            sizes = lengths[start : start + _CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = offset + np.cumsum(sizes)
            stream.write((ends - sizes).data)
            offset = int(ends[-1])
        for start in range(0, count + 1, _CHUNK):
            stream.write(np.arange(start, min(start + _CHUNK, count + 1), dtype=np.int64).data)


@dataclass(frozen=True)
class Index:
    """What an index says. sequence_lengths: [sequences] int32, in tokens."""

    dtype: np.dtype
    sequence_lengths: np.ndarray
    documents: int
    tokens: int


def read_index(prefix: str | Path) -> Index:
    """Read `PREFIX.idx` and check it against itself and against the size of `PREFIX.bin`.

    Raises:
        InputError: a file is missing, the header is not Megatron's, or either file is cut short or too long.
    """
    path, data = idx_path(prefix), bin_path(prefix)
    for needed in (path, data):
        if not needed.is_file():
            raise InputError(f"{needed}: no such file; a dataset is a pair PREFIX.bin and PREFIX.idx")

    with open(path, "rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise InputError(f"{path}: not a Megatron index (its first bytes are not {_MAGIC[:7].decode()})")
        _, version, code, sequences, bounds = _HEADER.unpack(header)
        if version != _VERSION or code not in _DTYPES:
            raise InputError(f"{path}: version {version} with dtype code {code} is unknown; write it again")
        size, needed_size = os.fstat(stream.fileno()).st_size, _HEADER.size + 12 * sequences + 8 * bounds
        if size != needed_size:
            raise InputError(f"{path}: {_wrong_size(size, needed_size)}")
        lengths = np.fromfile(stream, np.int32, sequences)
        pointers = np.fromfile(stream, np.int64, sequences)
        documents = np.fromfile(stream, np.int64, bounds)

    dtype = _DTYPES[code]
    ends = np.cumsum(lengths, dtype=np.int64)
    if (lengths < 0).any() or not np.array_equal(pointers, (ends - lengths) * dtype.itemsize):
        raise InputError(f"{path}: sequence lengths and byte offsets disagree; the file is damaged, write it again")
    if not bounds or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise InputError(f"{path}: document bounds are out of order; the file is damaged, write it again")
    tokens = int(ends[-1]) if sequences else 0
    size, needed_size = data.stat().st_size, tokens * dtype.itemsize
    if size != needed_size:
        raise InputError(f"{data}: {_wrong_size(size, needed_size)} for the {tokens} tokens of its index")
    return Index(dtype, lengths, bounds - 1, tokens)


def _wrong_size(size: int, needed: int) -> str:
    return f"{'cut short' if size < needed else 'too long'}, {size} bytes instead of {needed}"
