"""Shards to texts: every line once, in order, with its number, from every format. Broken lines are named by number."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data_tools import batch as batches
from data_tools import reading, shards
from data_tools.batch import Batch
from data_tools.errors import InputError
from data_tools.reading import read_texts
from data_tools.shards import Shard, cut
from data_tools.tokenizer import train_bpe

Packer = Callable[[bytes], bytes]
PACKERS: dict[str, Packer] = {"gzip": gzip.compress, "zstd": zstandard.ZstdCompressor().compress}


def record(text: str) -> bytes:
    return json.dumps({"text": text}).encode()


def read(*files: Path, key: str = "text") -> list[tuple[Path, int, list[str], list[str]]]:
    """Path, first line, texts and problems, for every batch."""
    found, before = [], dict.fromkeys(files, 0)
    for shard in cut(files):
        start = before[shard.path]
        for batch in read_texts(shard, key):
            problems = [f"{start + number if number else 0}: {message}" for number, message in batch.problems]
            found.append((shard.path, before[shard.path] + 1, batch.texts, problems))
            before[shard.path] += batch.lines
    return found


def texts_of(*files: Path, key: str = "text") -> list[str]:
    assert not any(problems for *_, problems in read(*files, key=key))
    return [text for *_, texts, _ in read(*files, key=key) for text in texts]


def problems_of(*files: Path, key: str = "text") -> list[str]:
    return [problem for *_, problems in read(*files, key=key) for problem in problems]


def table(path: Path, **columns: object) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def set_sizes(shard_bytes: int, batch_bytes: int) -> None:
        monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
        monkeypatch.setattr(batches, "BATCH_BYTES", batch_bytes)
        monkeypatch.setattr(reading, "_PACKED_BYTES", batch_bytes)

    return set_sizes


@pytest.mark.parametrize("batch_bytes", [1, 10, 1 << 20])
@pytest.mark.parametrize("shard_bytes", [1, 16, 17, 100, 1 << 20])
def test_lines_come_once_in_order_with_their_numbers(
    tmp_path: Path, small: Callable[[int, int], None], shard_bytes: int, batch_bytes: int
) -> None:
    """A broken line stands for its number; the last line has no end; one is longer than most shards."""
    small(shard_bytes, batch_bytes)
    lines = [record(f"{i}") if i % 3 else b"{" * (150 if i == 9 else 1) for i in range(25)]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in files:
        path.write_bytes(b"\n".join(lines))
    assert len(list(cut(files))) == 2 * -(-files[0].stat().st_size // shard_bytes)
    for path in files:
        found = [batch for batch in read(*files) if batch[0] == path]
        assert [text for *_, texts, _ in found for text in texts] == [f"{i}" for i in range(25) if i % 3]
        numbers = [int(problem.partition(":")[0]) for *_, problems in found for problem in problems]
        assert numbers == [i + 1 for i in range(25) if i % 3 == 0]


@pytest.mark.parametrize("packer", PACKERS)
def test_compression_is_known_by_content(tmp_path: Path, small: Callable[[int, int], None], packer: str) -> None:
    """Two members, padding where gzip allows it, no last newline; in pieces that cut every boundary."""
    pack = PACKERS[packer]
    path = tmp_path / "no_suffix"
    padding = bytes(7) if packer == "gzip" else b""
    lines = [record(f"{i}") for i in range(9)]
    path.write_bytes(pack(b"\n".join(lines[:5]) + b"\n") + padding + pack(b"\n".join(lines[5:])) + padding)
    for batch_bytes in (1, 2, 3, 1 << 20):
        small(1 << 20, batch_bytes)
        assert texts_of(path) == [f"{i}" for i in range(9)]


@pytest.mark.parametrize("first", [0x50, 0x5F])
def test_a_zstd_file_that_begins_with_a_frame_to_be_skipped(tmp_path: Path, first: int) -> None:
    """As those of pzstd do, one before each frame."""
    skipped, pack = bytes([first, 0x2A, 0x4D, 0x18, 4, 0, 0, 0]) + b"size", PACKERS["zstd"]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skipped + pack(record("one") + b"\n") + skipped + pack(record("two")))
    assert texts_of(path) == ["one", "two"]


def test_a_zstd_window_of_two_gigabytes(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    path = tmp_path / "a.jsonl.zst"
    with open(path, "wb") as stream:
        writer = zstandard.ZstdCompressor(compression_params=parameters).stream_writer(stream, closefd=False)
        writer.write(record("long") + b"\n")
        writer.close()
    assert texts_of(path) == ["long"]


def test_marks_that_change_no_text_are_notes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + record("one") + b"\r\n" + record("two") + b"\r\n")
    (batch,) = read_texts(Shard(path), "text")
    assert batch == Batch(
        ["one", "two"], 2, [], [f"{path}:1: byte order mark ignored", f"{path}:1: CRLF line ends, read like LF"]
    )


def test_an_empty_file_is_a_problem(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.txt", "e.txt.gz", "f.parquet")]
    empty = [b"", gzip.compress(b""), zstandard.compress(b""), b"", gzip.compress(b"")]
    for path, content in zip(files, empty, strict=False):
        path.write_bytes(content)
    table(files[-1], text=pyarrow.array([], pyarrow.string()))
    for path in files:
        (problem,) = problems_of(path)
        assert problem.startswith("0: the file is empty")


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("damage", ["cut", "checksum", "content", "garbage"])
def test_a_broken_stream_is_a_problem_of_its_line(tmp_path: Path, packer: str, damage: str) -> None:
    lines = b"".join(record(f"{i}") + b"\n" for i in range(3))
    if packer == "zstd":
        parameters = zstandard.ZstdCompressionParameters.from_level(3, write_checksum=1)
        content = bytearray(zstandard.ZstdCompressor(compression_params=parameters).compress(lines))
    else:
        content = bytearray(gzip.compress(lines))
    if damage == "cut":
        content = content[:-10]
    elif damage == "checksum":
        content[-1] ^= 1
    elif damage == "content":
        content[10] = 0xFF
    else:
        content += b"no stream"
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    texts = [text for *_, texts, _ in read(path) for text in texts]
    (problem,) = problems_of(path)
    assert texts == [f"{i}" for i in range(len(texts))]
    assert problem.startswith(f"{len(texts) + 1}: the {packer} stream ")
    assert problem.endswith("; lost from here on")
    assert "\n" not in problem


def test_what_comes_before_the_damage_is_kept(tmp_path: Path) -> None:
    lines = b"".join(record(f"{i} {hash(i * 0.1)}") + b"\n" for i in range(50_000))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines)[:-1000])
    assert sum(len(texts) for *_, texts, _ in read(path)) > 40_000
    assert len(problems_of(path)) == 1


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    plain, packed, wrong = tmp_path / "a.txt", tmp_path / "b.txt.zst", tmp_path / "c.txt"
    text = "one\r\ntwo \x00 {\n" * 3
    plain.write_bytes(b"\xef\xbb\xbf" + text.encode())
    packed.write_bytes(zstandard.compress(text.encode()))
    wrong.write_bytes(b"one\ntwo\xff\n")
    assert texts_of(plain, packed) == [text, text]
    (batch,) = read_texts(Shard(plain), "text")
    assert (batch.lines, batch.notes) == (1, [f"{plain}:1: byte order mark ignored"])
    assert problems_of(wrong) == ["2: not valid UTF-8: invalid start byte; the whole text is left out"]
    packed.write_bytes(packed.read_bytes()[:-4])
    assert problems_of(packed) == ["0: the zstd stream ends early; the whole text is left out"]


def test_tables_are_read_by_row_groups(tmp_path: Path, small: Callable[[int, int], None]) -> None:
    words = [f"{'word ' * i}" for i in range(20)]
    strings: dict[str, object] = {
        "string": pyarrow.array(words),
        "large": pyarrow.array(words, pyarrow.large_string()),
        "bytes": pyarrow.array([word.encode() for word in words]),
        "dictionary": pyarrow.array(words).dictionary_encode(),
    }
    path = table(tmp_path / "a.parquet", id=list(range(20)), **strings)
    for shard_bytes, count in ((1, 7), (1 << 20, 1)):
        small(shard_bytes, 100)
        assert len(list(cut([path]))) == count
        for key in strings:
            assert texts_of(path, key=key) == words


def test_problems_of_tables(tmp_path: Path, small: Callable[[int, int], None]) -> None:
    small(1, 1)  # each row a batch, each row group a shard
    column = pyarrow.array([b"one", None, b"\xff", b"four", b"", None])
    path = table(tmp_path / "a.parquet", body=column, id=[1, 2, 3, 4, 5, 6])
    assert problems_of(path, key="body") == [
        "2: the value of 'body' is null, not a string",
        "3: not valid UTF-8: invalid start byte at byte 1",
        "6: the value of 'body' is null, not a string",
    ]
    assert [text for *_, texts, _ in read(path, key="body") for text in texts] == ["one", "four", ""]
    small(1 << 20, 1)
    assert problems_of(path) == ["0: no column 'text' (columns: 'body', 'id'); 6 rows are left out"]
    assert problems_of(path, key="id") == ["0: the column 'id' is int64, not string; 6 rows are left out"]


def test_a_broken_table_is_a_problem(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", text=[f"{i} {hash(i * 0.1)}" for i in range(9)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    (problem,) = problems_of(path)
    assert problem.startswith("0: not readable as Parquet (")
    assert problem.endswith("; the whole file is left out")
    footer = bytearray(whole)
    at = footer.index(b"text", len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"))
    footer[at] = 0xFF  # a name of a column that is no UTF-8
    path.write_bytes(footer)
    (problem,) = problems_of(path)
    assert problem.startswith("0: not readable as Parquet (")


WRITERS: dict[str, dict[str, object]] = {
    "plain": {"compression": "none", "use_dictionary": False},
    "dictionary": {"compression": "none", "use_dictionary": True},
    "snappy": {"compression": "snappy", "use_dictionary": False},
    "zstd": {"compression": "zstd", "use_dictionary": False, "data_page_version": "2.0"},
    "checksums": {"compression": "none", "use_dictionary": False, "write_page_checksum": True},
}


def damaged_table(path: Path, **writer: object) -> list[str]:
    """Five groups of 200 rows, the third with a broken page in the column `text`; returns all texts."""
    texts = [f"{i} {'word ' * (i % 20)}" for i in range(1000)]
    columns = {"id": list(range(1000)), "text": texts, "more": texts[::-1]}
    parquet.write_table(
        pyarrow.table(columns), path, row_group_size=200, data_page_size=1000, write_batch_size=20, **writer
    )
    column = parquet.ParquetFile(path).metadata.row_group(2).column(1)
    content = bytearray(path.read_bytes())
    at = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size * 2 // 3
    content[at : at + 150] = b"\xff" * 150
    path.write_bytes(content)
    return texts


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("shard_bytes", [1, 1 << 24])
def test_a_damaged_page_loses_the_rest_of_its_row_group(
    tmp_path: Path, small: Callable[[int, int], None], writer: str, shard_bytes: int
) -> None:
    """Whether its group is read alone or with others. Every row that is lost is counted."""
    small(shard_bytes, 1 << 20)
    path = tmp_path / "a.parquet"
    texts = damaged_table(path, **WRITERS[writer])
    found = [batch for shard in cut([path]) for batch in read_texts(shard, "text")]
    kept = [text for batch in found for text in batch.texts]
    lost = sum(batch.lost for batch in found)
    assert sum(batch.lines for batch in found) == 1000 and len(kept) + lost == 1000
    assert 1 <= lost <= 200 and kept == texts[: 600 - lost] + texts[600:]
    *cells, problem = problems_of(path)  # a text that is half damaged is a problem of its own
    rows = lost - len(cells)
    assert problem.startswith(f"{601 - rows}: not readable as Parquet (") and "\n" not in problem
    assert problem.endswith(f"): {rows} rows, to the end of row group 3 of 5")


def test_what_comes_before_a_damaged_page_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    damaged_table(path, **WRITERS["snappy"])
    (problem,) = problems_of(path)
    assert 401 < int(problem.partition(":")[0]) < 601


def test_a_tokenizer_is_not_trained_on_a_damaged_table(tmp_path: Path) -> None:
    damaged_table(tmp_path / "a.parquet", **WRITERS["snappy"])
    with pytest.raises(
        InputError, match=r"a\.parquet:\d+: .*rows, to the end of row group 3 of 5; fix it or leave it out"
    ):
        train_bpe([tmp_path / "a.parquet"], 300, tmp_path / "bpe")
    assert not (tmp_path / "bpe").exists()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("folder", "folder.parquet", "folder.txt"):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=f"cannot read {tmp_path / name}: Is a directory"):
            list(read_texts(Shard(tmp_path / name), "text"))
    with pytest.raises(InputError, match="cannot read .*gone.jsonl: No such file or directory"):
        list(cut([tmp_path / "gone.jsonl"]))
    with pytest.raises(InputError, match="cannot read .*gone.parquet: No such file or directory"):
        read(tmp_path / "gone.parquet")


def test_a_file_that_shrinks_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(record("one") + b"\n")
    *_, last = read_texts(Shard(path, 0, 1000), "text")
    assert last.problems == [(2, "the file became shorter while it was read; lost from here on")]
