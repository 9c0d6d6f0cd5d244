"""Set documents aside for held-out evaluation.

The side of a document depends on its token ids alone: their BLAKE2b hash of 8 bytes, as a number, is compared with the
fraction. So adding, removing or moving other documents does not change it, and its copies are on the same side.
"""

from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_tools.errors import InputError
from data_tools.indexed import Index, IndexedWriter, bin_path, read_index
from data_tools.outputs import check_output
from data_tools.progress import OnProgress, no_progress


@dataclass(frozen=True)
class Side:
    """What one side of a split got."""

    documents: int
    tokens: int


def split(
    prefix: str | Path,
    train_prefix: str | Path,
    held_out_prefix: str | Path,
    fraction: float,
    seed: int = 0,
    overwrite: bool = False,
    progress: OnProgress = no_progress,
) -> tuple[Side, Side]:
    """Write every document to one of two datasets, in its order. Returns what train and held-out got.

    fraction: the held-out share of all distinct documents; a smaller one with the same seed holds out a subset.
    progress: gets the bytes of token ids, read and in all.

    Raises:
        InputError: the dataset is damaged, an option is out of range, a side would be empty, or an output
            cannot be written.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction is {fraction}; it must lie between 0 and 1")
    if not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}; it must lie between 0 and 2**64 - 1")
    if bin_path(train_prefix).resolve() == bin_path(held_out_prefix).resolve():
        raise InputError(f"{held_out_prefix}: named for both sides; choose another output")
    for output in (train_prefix, held_out_prefix):
        check_output(output, [prefix], overwrite)
    index = read_index(prefix)

    with IndexedWriter(held_out_prefix, index.dtype) as held_out, IndexedWriter(train_prefix, index.dtype) as train:
        tokens = index.map_tokens()
        for first, last in index.document_ranges():
            bounds = index.document_bounds[first : last + 1]
            offsets = index.token_offsets(first, last)
            ids = tokens[offsets[0] : offsets[-1]]
            lengths = index.sequence_lengths[bounds[0] : bounds[-1]]
            chosen = document_hashes(ids, offsets, seed) < np.uint64(int(fraction * 2**64))
            for writer, side in ((train, ~chosen), (held_out, chosen)):
                writer.add_documents(
                    ids[np.repeat(side, np.diff(offsets))],
                    lengths[np.repeat(side, np.diff(bounds))],
                    np.diff(bounds)[side],
                )
            progress(int(offsets[-1]) * index.dtype.itemsize, tokens.nbytes)
        _refuse_empty(index, train, held_out)
        for writer in (train, held_out):  # both are complete before either gets its name
            writer.complete()
    return Side(train.documents, train.tokens), Side(held_out.documents, held_out.tokens)


def document_hashes(ids: np.ndarray, offsets: np.ndarray, seed: int) -> np.ndarray:
    """A number for each document that depends on its ids and the seed, not on the dtype: [documents] uint64.

    ids: [tokens], documents end to end; offsets: [documents + 1], where they begin, and the end of the last.
    """
    content = memoryview(ids.astype("<u4").tobytes())
    salt = seed.to_bytes(16, "little")
    ends = ((offsets - offsets[0]) * 4).tolist()
    digests = [blake2b(content[start:end], digest_size=8, salt=salt).digest() for start, end in pairwise(ends)]
    return np.frombuffer(b"".join(digests), "<u8")


def _refuse_empty(index: Index, train: IndexedWriter, held_out: IndexedWriter) -> None:
    if not held_out.tokens:
        raise InputError(
            f"{index.prefix}: none of {index.documents} documents would be held out; raise --fraction or change --seed"
        )
    if not train.tokens:
        raise InputError(
            f"{index.prefix}: all {index.documents} documents would be held out; lower --fraction or change --seed"
        )
