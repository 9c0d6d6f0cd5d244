"""The indexed format, compared with Megatron's own builder and reader."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from data_tools import indexed
from data_tools.errors import InputError
from data_tools.indexed import IndexedWriter, read_index, smallest_dtype

Tree = Callable[[Path], list[str]]
DOCUMENTS = [[1, 2, 3], [], [65499], list(range(1000)), [], [7, 8]]


def write(prefix: Path, dtype: type[np.integer] = np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in DOCUMENTS:
            writer.add_document(np.array(document, dtype=np.int64))
    return prefix


def replace_bytes(path: Path, position: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[position : position + len(new)] = new
    path.write_bytes(content)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("chunk", [2, 1 << 20])
def test_bytes_are_those_of_megatrons_builder(
    tmp_path: Path, dtype: type[np.integer], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", dtype)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_without_documents_too(tmp_path: Path) -> None:
    IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32).finalize(str(tmp_path / "theirs.idx"))
    with IndexedWriter(tmp_path / "ours", np.int32):
        pass
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert (tmp_path / "ours.bin").read_bytes() == b""
    assert read_index(tmp_path / "ours").documents == 0


def test_megatron_reads_it(tmp_path: Path) -> None:
    dataset = IndexedDataset(str(write(tmp_path / "data.v1")))
    assert [list(dataset[i]) for i in range(len(dataset))] == DOCUMENTS
    assert list(dataset.document_indices) == list(range(len(DOCUMENTS) + 1))


def test_documents_end_to_end_are_the_same(tmp_path: Path) -> None:
    write(tmp_path / "one_by_one")
    with IndexedWriter(tmp_path / "together", np.uint16) as writer:
        ids = np.array([i for document in DOCUMENTS for i in document], dtype=np.uint16)
        writer.add_documents(ids, [len(document) for document in DOCUMENTS])
    for suffix in (".bin", ".idx"):
        one_by_one, together = tmp_path / f"one_by_one{suffix}", tmp_path / f"together{suffix}"
        assert together.read_bytes() == one_by_one.read_bytes()


@pytest.mark.parametrize("vocab_size", [1, 32000, 65499, 65500, 65535, 65536, 200000])
def test_smallest_dtype_is_megatrons(vocab_size: int) -> None:
    assert smallest_dtype(vocab_size) is DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("ids", [[65536], [-1]])
def test_an_id_never_wraps_around(tmp_path: Path, ids: list[int], tree: Tree) -> None:
    with pytest.raises(ValueError, match="do not fit uint16"), IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document(np.array(ids))
    assert tree(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_and_keeps_what_was(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "old")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("old", "new"):
        with pytest.raises(error), IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(np.arange(10))
            assert not (tmp_path / "new.bin").exists()
            raise error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stream: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(indexed, "sync", full)
    refused = pytest.raises(InputError, match=r"cannot write .*data\.\w+: No space left on device$")
    with refused, IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document(np.arange(10))
    assert tree(tmp_path) == []


def test_a_sequence_longer_than_the_format_is_refused(tmp_path: Path, tree: Tree) -> None:
    refused = pytest.raises(InputError, match="a sequence of 2147483648 tokens; the format ends at 2147483647")
    with refused, IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document(np.broadcast_to(np.uint16(1), 2**31))
    assert tree(tmp_path) == []


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(InputError, match="cannot write .*file/data.bin: ")
    with refused, IndexedWriter(tmp_path / "file" / "data", np.uint16):
        pass


def test_read_index_tells_what_was_written(tmp_path: Path) -> None:
    index = read_index(write(tmp_path / "data"))
    assert index.dtype == np.uint16
    assert list(index.sequence_lengths) == [len(document) for document in DOCUMENTS]
    assert (index.documents, index.tokens) == (len(DOCUMENTS), sum(map(len, DOCUMENTS)))


def test_read_index_takes_documents_of_several_sequences(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.int64)
    builder.add_document(torch.arange(6), [2, 4])
    builder.add_document(torch.arange(3), [3])
    builder.finalize(str(tmp_path / "data.idx"))
    index = read_index(tmp_path / "data")
    assert (list(index.sequence_lengths), index.documents, index.tokens) == ([2, 4, 3], 2, 9)


# The index of DOCUMENTS: 34 bytes of header, 6 lengths, 6 pointers, 7 document bounds.
BREAKAGES = {
    r"\.idx: no such file": lambda idx, data: idx.unlink(),
    r"\.bin: no such file": lambda idx, data: data.unlink(),
    r"\.idx: not a Megatron index": lambda idx, data: replace_bytes(idx, 0, b"X"),
    r"\.idx: not a Megatron index \(": lambda idx, data: idx.write_bytes(idx.read_bytes()[:20]),
    r"\.idx: version 2 with dtype code 8": lambda idx, data: replace_bytes(idx, 9, b"\x02"),
    r"\.idx: version 1 with dtype code 99": lambda idx, data: replace_bytes(idx, 17, b"\x63"),
    r"\.idx: no document bounds": lambda idx, data: idx.write_bytes(idx.read_bytes()[:18] + bytes(16)),
    r"\.idx: cut short, 161 bytes instead of 162": lambda idx, data: idx.write_bytes(idx.read_bytes()[:-1]),
    r"\.idx: too long, 163 bytes instead of 162": lambda idx, data: idx.write_bytes(idx.read_bytes() + b"\0"),
    r"\.idx: cut short, 162 bytes instead of 3377699720528034 ": lambda idx, data: replace_bytes(idx, 24, b"\x01"),
    r"\.idx: negative lengths at 1 of 6 sequences, first at sequence 2": lambda idx, data: replace_bytes(
        idx, 45, b"\xff"
    ),
    r"\.idx: sequence lengths and byte offsets disagree at 1 of 6 sequences, first at sequence 1": lambda idx, data: (
        replace_bytes(idx, 34, b"\x04")
    ),
    r"\.idx: .* disagree at 2 of 6 sequences, first at sequence 3": lambda idx, data: replace_bytes(
        idx, 58 + 3 * 8, b"\x07"
    ),
    r"\.idx: .* disagree at 2 of 6 sequences, first at sequence 0": lambda idx, data: replace_bytes(idx, 58, b"\x02"),
    r"\.idx: document bounds out of order at 1 of 6 documents, first at document 2": lambda idx, data: replace_bytes(
        idx, 34 + 6 * 12 + 8, b"\x05"
    ),
    r"\.idx: document bounds go from 1 to 6 instead of": lambda idx, data: replace_bytes(idx, 34 + 6 * 12, b"\x01"),
    r"\.idx: document bounds go from 0 to 7 instead of": lambda idx, data: replace_bytes(idx, 34 + 6 * 20, b"\x07"),
    r"\.bin: cut short, 2011 bytes instead of 2012": lambda idx, data: data.write_bytes(data.read_bytes()[:-1]),
    r"\.bin: too long, 2013 bytes instead of 2012": lambda idx, data: data.write_bytes(data.read_bytes() + b"\0"),
    r"\.bin: cut short, 0 bytes instead of 2012": lambda idx, data: data.write_bytes(b""),
}


@pytest.mark.parametrize("message", BREAKAGES)
@pytest.mark.parametrize("chunk", [2, 1 << 20])
def test_read_index_names_the_file_and_what_is_wrong(
    tmp_path: Path, message: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write(tmp_path / "data")
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    BREAKAGES[message](tmp_path / "data.idx", tmp_path / "data.bin")
    with pytest.raises(InputError, match=message) as caught:
        read_index(prefix)
    assert "\n" not in str(caught.value)
