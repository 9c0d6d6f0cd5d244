"""Files to batches: every line once, in order, with its number."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools import reading
from data_tools.errors import InputError
from data_tools.reading import read_batches


@pytest.mark.parametrize("batch_bytes", [1, 10, 1 << 20])
def test_batches_hold_all_lines_with_their_numbers(
    jsonl: Callable[..., Path], batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BATCH_BYTES", batch_bytes)
    lines = [b"line %d" % i for i in range(25)]
    files = [jsonl("a.jsonl", *lines), jsonl("b.jsonl", *lines)]
    found = [
        (batch.path, number, line)
        for batch in read_batches(files)
        for number, line in enumerate(batch.lines, batch.first_line)
    ]
    assert found == [(path, i + 1, line + b"\n") for path in files for i, line in enumerate(lines)]


def test_memory_holds_one_batch(jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BATCH_BYTES", 10)
    assert max(len(batch.lines) for batch in read_batches([jsonl("a.jsonl", *[b"1234"] * 20)])) == 2


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "no_suffix"
    path.write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two"))  # two members, no last newline
    assert [batch.lines for batch in read_batches([path])] == [[b"one\n", b"two"]]


def test_marks_that_change_no_text_are_reported(jsonl: Callable[..., Path]) -> None:
    path, messages = jsonl("a.jsonl", b"\xef\xbb\xbfone\r", b"two\r"), []
    (batch,) = read_batches([path], messages.append)
    assert batch.lines == [b"one\r\n", b"two\r\n"]
    assert messages == [
        f"note: {path}:1: byte order mark ignored",
        f"note: {path}:1: CRLF line ends, read like LF",
    ]


def test_an_empty_file_is_a_problem(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.touch()
    packed.write_bytes(gzip.compress(b""))
    assert [batch.problems for batch in read_batches([plain, packed])] == [
        [f"{plain}: the file is empty"],
        [f"{packed}: the file is empty"],
    ]


@pytest.mark.parametrize("damage", ["cut", "checksum", "deflate"])
def test_a_broken_gzip_stream_is_a_problem_of_its_line(tmp_path: Path, damage: str) -> None:
    content = bytearray(gzip.compress(b"".join(b"line %d\n" % i for i in range(3))))
    if damage == "cut":
        content = content[:-10]
    elif damage == "checksum":
        content[-8] ^= 1
    else:
        content[10] = 0xFF
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    (batch,) = read_batches([path])
    (problem,) = batch.problems
    assert problem.startswith(f"{path}:{len(batch.lines) + 1}: the gzip stream is broken from here on (")
    assert "\n" not in problem


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"cannot read {tmp_path}: Is a directory"):
        list(read_batches([tmp_path]))
