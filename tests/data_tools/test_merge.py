"""Merging, compared with Megatron's own `add_index`."""

import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, _IndexWriter

from data_tools import indexed
from data_tools.errors import InputError
from data_tools.indexed import read_index, write_index
from data_tools.merge import merge
from tests.data_tools.datasets import SENTENCES, by_hand, by_megatron, parse, random_documents

Command = Callable[..., tuple[int, str, str]]
Tree = Callable[[Path], list[str]]
REPOSITORY = Path(__file__).parents[2]
MANY = random_documents(60, 1)


def content(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def merged_by_megatron(prefixes: list[Path], out: Path, dtype: type[np.integer]) -> Path:
    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=dtype)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(f"{out}.idx")
    return out


@pytest.mark.parametrize(("code", "dtype", "chunk"), [(8, np.uint16, 3), (4, np.int32, 1 << 20)])
def test_bytes_are_those_of_megatrons_merge(
    tmp_path: Path, code: int, dtype: type[np.integer], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One input of several sequences per document by hand, one without documents, one of Megatron's making."""
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    monkeypatch.setattr(indexed, "_COPY_BYTES", chunk)
    inputs = [
        by_hand(tmp_path / "sentences", SENTENCES, code),
        by_hand(tmp_path / "none", [], code),
        by_megatron(tmp_path / "many", MANY, dtype),
    ]
    before = {path: content(path) for path in inputs}
    merged = merge(inputs, tmp_path / "ours")
    assert content(tmp_path / "ours") == content(merged_by_megatron(inputs, tmp_path / "theirs", dtype))
    assert parse(tmp_path / "ours") == SENTENCES + MANY
    assert (merged.documents, merged.tokens) == (65, read_index(tmp_path / "ours").tokens)
    assert {path: content(path) for path in inputs} == before


def test_the_command_takes_prefixes_and_names_of_indexes(tmp_path: Path, command: Command) -> None:
    one, two = by_hand(tmp_path / "one", SENTENCES), by_hand(tmp_path / "two", MANY)
    status, out, err = command("merge", two, f"{one}.idx", "--output", tmp_path / "new" / "out")
    assert (status, err) == (0, "") and "out: 65 documents, " in out and out.count("\n") == 1
    assert parse(tmp_path / "new" / "out") == MANY + SENTENCES


def test_more_inputs_than_a_process_may_open_files(tmp_path: Path) -> None:
    inputs = [by_hand(tmp_path / f"{i}", SENTENCES) for i in range(200)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        merge(inputs, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert parse(tmp_path / "out") == SENTENCES * 200


def test_refused_before_anything_is_written(tmp_path: Path, command: Command, tree: Tree) -> None:
    one, two = by_hand(tmp_path / "one", SENTENCES), by_hand(tmp_path / "two", MANY)
    by_hand(tmp_path / "wide", SENTENCES, code=4)
    by_hand(tmp_path / "taken", SENTENCES)
    by_hand(tmp_path / "cut", SENTENCES)
    os.truncate(tmp_path / "cut.bin", 5)
    (tmp_path / "link").symlink_to(tmp_path)
    before = tree(tmp_path), content(tmp_path / "taken"), content(one)

    def refused(message: str, *arguments: str | Path) -> None:
        status, out, err = command("merge", *arguments)
        assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
        assert message in err
        assert (tree(tmp_path), content(tmp_path / "taken"), content(one)) == before

    refused("wide holds int32 and ", one, two, tmp_path / "wide", "--output", tmp_path / "out")
    refused("one: both an input and the output", one, two, "--output", one, "--overwrite")
    refused("one: both an input and the output", one, "--output", tmp_path / "link" / "one", "--overwrite")
    refused("one: named twice", one, two, tmp_path / "link" / "one", "--output", tmp_path / "out")
    refused("taken.bin exists; choose another output or pass --overwrite", one, "--output", tmp_path / "taken")
    refused("cut.bin: cut short, 5 bytes instead of 28", one, tmp_path / "cut", "--output", tmp_path / "out")
    refused("cut.bin: cut short", one, tmp_path / "cut", "--output", tmp_path / "taken", "--overwrite")
    refused("three.idx: no such file", one, tmp_path / "three", "--output", tmp_path / "out")
    refused("cannot write ", one, "--output", tmp_path / "one.bin" / "out")
    refused("names no file; give a prefix", one, "--output", f"{tmp_path}/")

    assert command("merge", one, two, "--output", tmp_path / "taken", "--overwrite")[0] == 0
    assert parse(tmp_path / "taken") == SENTENCES + MANY


def test_an_input_that_grows_meanwhile_is_noticed(tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    one = by_hand(tmp_path / "one", SENTENCES)
    add_index = indexed.IndexedWriter.add_index

    def grow(writer: indexed.IndexedWriter, index: indexed.Index, *report: Any) -> None:
        with open(f"{one}.bin", "ab") as stream:
            stream.write(b"\1\1")
        add_index(writer, index, *report)

    monkeypatch.setattr(indexed.IndexedWriter, "add_index", grow)
    with pytest.raises(InputError, match="one.bin: changed while it was read"):
        merge([one], tmp_path / "out")
    assert tree(tmp_path) == ["one.bin", "one.idx"]


def test_a_write_that_fails_is_one_line_and_leaves_nothing(tmp_path: Path, tree: Tree) -> None:
    """A real failing write: the system refuses this process files of more than 4000 bytes."""
    one = by_hand(tmp_path / "one", random_documents(400, 2))
    before = tree(tmp_path)
    failed = subprocess.run(
        [sys.executable, "-m", "data_tools", "merge", one, "--output", tmp_path / "out"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
    )
    assert (failed.returncode, failed.stdout) == (1, "")  # it may pass
    assert failed.stderr == f"error: cannot write {tmp_path / 'out'}.bin: File too large\n"
    assert tree(tmp_path) == before


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Four sequences of the longest size the format has: the index that Megatron writes."""
    lengths = np.array([2**31 - 1, 2**31 - 1, 5, 2**31 - 1], np.int32)
    with _IndexWriter(str(tmp_path / "theirs.idx"), np.int32) as writer:
        writer.write(list(lengths), None, [0, 1, 4])
    with open(tmp_path / "ours.idx", "wb") as stream:
        write_index(stream, np.dtype(np.int32), lengths, np.array([0, 1, 4]))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


@pytest.mark.slow
def test_more_tokens_than_32_bits(tmp_path: Path) -> None:
    """2.2e9 tokens of one byte each, in sparse files, but copied in full."""
    inputs = []
    for name in ("one", "two"):
        with open(tmp_path / f"{name}.bin", "wb") as data, open(tmp_path / f"{name}.idx", "wb") as lengths:
            data.truncate(1_100_000_000)
            data.write(name.encode())
            write_index(lengths, np.dtype(np.uint8), np.array([1_000_000_000, 100_000_000], np.int32))
        inputs.append(tmp_path / name)
    merge(inputs, tmp_path / "out")
    index = read_index(tmp_path / "out")
    assert index.tokens == 2_200_000_000
    assert index.sequence_offsets.tolist() == [0, 1_000_000_000, 1_100_000_000, 2_100_000_000]
    assert bytes(index.map_tokens()[1_100_000_000:][:3]) == b"two"
    del index
    for path in tmp_path.iterdir():  # gigabytes that pytest would keep
        path.unlink()


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two million documents, whose index has 40 MB."""
    monkeypatch.setattr(indexed, "_CHUNK", 1 << 14)
    monkeypatch.setattr(indexed, "_COPY_BYTES", 1 << 16)
    with open(tmp_path / "in.idx", "wb") as stream:
        write_index(stream, np.dtype(np.uint8), np.ones(2_000_000, np.int32))
    (tmp_path / "in.bin").write_bytes(bytes(2_000_000))
    tracemalloc.start()
    try:
        merge([tmp_path / "in"], tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6
    assert content(tmp_path / "out") == content(tmp_path / "in")
