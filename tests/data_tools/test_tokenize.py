"""From JSON lines to a dataset: the content, what is left out, and what is refused."""

import gzip
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_tools import engines, shards
from data_tools.errors import InputError
from data_tools.indexed import open_index, read_index
from data_tools.partial import Stats
from data_tools.tokenize import tokenize
from data_tools.tokenizer import load_tokenizer
from tests.data_tools.datasets import texts_of

Tree = Callable[[Path], list[str]]
GOOD = b'{"text": "good"}'
BROKEN_FILES = {
    "utf8": (GOOD + b'\n{"text": "\xff"}\n' + GOOD + b"\n", ":2: not valid UTF-8"),
    "json": (GOOD + b"\n{\n" + GOOD + b"\n", ":2: not valid JSON"),
    "key": (GOOD + b'\n{"body": "x"}\n' + GOOD, ":2: no key 'text'"),
    "type": (GOOD + b'\n{"text": 1}\n' + GOOD, ":2: the value of 'text' is a number"),
    "surrogate": (GOOD + b'\n{"text": "\\udc00"}\n' + GOOD, ":2: the text is not valid Unicode"),
    "gzip": (gzip.compress(GOOD + b"\n" + GOOD + b"\n")[:-8], ":3: the gzip stream ends early"),
}


def content(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_dir: Path) -> tuple[Path, Stats]:
    prefix = tmp_path_factory.mktemp("reference") / "data"
    return prefix, tokenize([corpus], prefix, tokenizer_dir)


def test_documents_are_what_auto_tokenizer_gives(
    reference: tuple[Path, Stats], corpus: Path, tokenizer_dir: Path
) -> None:
    prefix, stats = reference
    theirs = AutoTokenizer.from_pretrained(tokenizer_dir, split_special_tokens=True)
    texts = texts_of(corpus)
    dataset = IndexedDataset(str(prefix))
    assert len(dataset) == len(texts) == stats.documents
    for i in range(0, len(texts), 7):
        assert dataset[i].tolist() == [*theirs.encode(texts[i]), 2]
    assert read_index(prefix).dtype == np.uint16
    assert stats.tokens == read_index(prefix).tokens
    assert stats.bytes == sum(len(text.encode()) for text in texts)
    assert (stats.empty, stats.skipped) == (0, 0)
    assert stats.seconds > 0


def test_files_are_those_of_the_published_format(
    reference: tuple[Path, Stats], corpus: Path, tokenizer_dir: Path
) -> None:
    """Written here by hand, with ids by `tokenizers` alone."""
    theirs = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    theirs.encode_special_tokens = True
    texts = texts_of(corpus)
    documents = [[*theirs.encode(text, add_special_tokens=False).ids, 2] for text in texts]
    count, sizes = len(documents), [len(document) for document in documents]
    starts = [2 * sum(sizes[:i]) for i in range(count)]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    index += struct.pack(f"<{count}i{count}q{count + 1}q", *sizes, *starts, *range(count + 1))
    data = b"".join(struct.pack(f"<{len(document)}H", *document) for document in documents)
    assert content(reference[0]) == (data, index)


@pytest.mark.parametrize("vocabulary", [400, 65_499, 65_500])
def test_files_are_those_of_megatrons_builder(
    tmp_path: Path, tokenizer_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: int
) -> None:
    monkeypatch.setattr(engines, "vocabulary_size", lambda tokenizer: vocabulary)
    tokenize([text_file], tmp_path / "ours", tokenizer_dir)
    theirs = AutoTokenizer.from_pretrained(tokenizer_dir, split_special_tokens=True)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocabulary))
    for text in texts_of(text_file):
        ids = [*theirs.encode(text), 2]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")


def test_any_number_of_workers_gives_the_same(
    reference: tuple[Path, Stats], tmp_path: Path, corpus: Path, tokenizer_dir: Path
) -> None:
    tokenize([corpus], tmp_path / "data", tokenizer_dir, workers=2)
    assert content(tmp_path / "data") == content(reference[0])


def test_shards_in_a_folder_give_the_same_as_one_file(
    reference: tuple[Path, Stats], tmp_path: Path, corpus: Path, tokenizer_dir: Path
) -> None:
    """Gzipped, plain, with a byte order mark and CRLF line ends: none of them changes a text."""
    lines = corpus.read_bytes().splitlines(keepends=True)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "0.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:500])))
    (shards / "1.jsonl").write_bytes(b"".join(lines[500:700]))
    marked = b"\xef\xbb\xbf" + b"".join(line.replace(b"\n", b"\r\n") for line in lines[700:])
    (shards / "2.jsonl").write_bytes(marked)
    messages: list[str] = []
    tokenize([shards], tmp_path / "data", tokenizer_dir, workers=2, report=messages.append)
    assert content(tmp_path / "data") == content(reference[0])
    assert [message.split(": ")[-1] for message in messages] == [
        "byte order mark ignored",
        "CRLF line ends, read like LF",
    ]


def test_without_ends_of_documents(tmp_path: Path, tokenizer_dir: Path, text_file: Path) -> None:
    tokenize([text_file], tmp_path / "a", tokenizer_dir, append_eod=False)
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert not any(2 in dataset[i] for i in range(len(dataset)))  # though one of the texts spells </s>


def test_empty_documents_are_left_out_and_counted(
    tmp_path: Path, tokenizer_dir: Path, jsonl: Callable[..., Path]
) -> None:
    path = jsonl("a.jsonl", GOOD, b'{"text": ""}', b"", GOOD)
    stats = tokenize([path], tmp_path / "a", tokenizer_dir)
    assert (stats.documents, stats.empty, stats.skipped) == (2, 2, 0)
    assert read_index(tmp_path / "a").documents == 2


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_broken_line_stops_or_is_skipped(tmp_path: Path, tokenizer_dir: Path, kind: str, tree: Tree) -> None:
    raw, problem = BROKEN_FILES[kind]
    path = tmp_path / "in.jsonl"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        tokenize([path], tmp_path / "out", tokenizer_dir)
    assert str(caught.value).startswith(f"{path}{problem}")
    assert str(caught.value).endswith("; fix it, or leave such lines out with --on-error skip")
    assert tree(tmp_path) == ["in.jsonl"]

    messages: list[str] = []
    stats = tokenize([path], tmp_path / "out", tokenizer_dir, on_error="skip", report=messages.append)
    assert (stats.documents, stats.skipped) == (2, 1)
    assert len(messages) == 1 and messages[0].startswith(f"skipped: {path}{problem}")
    assert read_index(tmp_path / "out").documents == 2


def test_an_empty_file_stops_or_is_skipped(tmp_path: Path, tokenizer_dir: Path, jsonl: Callable[..., Path]) -> None:
    files = [jsonl("empty.jsonl"), jsonl("good.jsonl", GOOD)]
    with pytest.raises(InputError, match="empty.jsonl: the file is empty; fix it"):
        tokenize(files, tmp_path / "out", tokenizer_dir)
    stats = tokenize(files, tmp_path / "out", tokenizer_dir, on_error="skip", report=lambda message: None)
    assert (stats.documents, stats.skipped) == (1, 1)


def test_the_first_broken_line_is_the_one_named(
    tmp_path: Path, tokenizer_dir: Path, jsonl: Callable[..., Path], tree: Tree
) -> None:
    path = jsonl("a.jsonl", *[GOOD] * 40_000, b"{", *[GOOD] * 40_000, b"{")
    with pytest.raises(InputError, match="a.jsonl:40001: not valid JSON"):
        tokenize([path], tmp_path / "out", tokenizer_dir, workers=2)
    assert tree(tmp_path) == ["a.jsonl"]


def test_many_broken_lines_are_all_counted(tmp_path: Path, tokenizer_dir: Path, jsonl: Callable[..., Path]) -> None:
    messages: list[str] = []
    path = jsonl("a.jsonl", *[b"{"] * 33, GOOD)
    stats = tokenize([path], tmp_path / "out", tokenizer_dir, on_error="skip", report=messages.append)
    assert stats.skipped == 33
    assert len(messages) == 21
    assert messages[-1] == "skipped: 13 more"
    skipped = (tmp_path / "out.skipped.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in skipped] == [f"{path}:{i + 1}" for i in range(33)]
    tokenize([jsonl("b.jsonl", GOOD)], tmp_path / "out", tokenizer_dir, overwrite=True)
    assert not (tmp_path / "out.skipped.txt").exists()


def test_notes_do_not_fill_the_screen(tmp_path: Path, tokenizer_dir: Path) -> None:
    for i in range(23):
        (tmp_path / f"{i:02}.jsonl").write_bytes(GOOD + b"\r\n")
    messages: list[str] = []
    tokenize([tmp_path], tmp_path / "out", tokenizer_dir, report=messages.append)
    assert len(messages) == 21
    assert messages[-1] == "note: 3 more such notes"


def test_every_format_in_one_run(
    reference: tuple[Path, Stats], tmp_path: Path, tokenizer_dir: Path, corpus: Path
) -> None:
    texts = texts_of(corpus)
    lines = corpus.read_bytes().splitlines(keepends=True)
    (tmp_path / "0.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[:500])))
    pq.write_table(pyarrow.table({"text": texts[500:1599]}), tmp_path / "1.parquet", row_group_size=100)
    (tmp_path / "2.txt").write_text(texts[1599], newline="")
    inputs = [tmp_path / name for name in ("0.jsonl.zst", "1.parquet", "2.txt")]
    tokenize(inputs, tmp_path / "out", tokenizer_dir, workers=2)
    assert content(tmp_path / "out") == content(reference[0])


def test_numbers_of_lines_go_on_over_shards(
    tmp_path: Path, tokenizer_dir: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(corpus.read_bytes() + b"{\n")
    second.write_bytes(corpus.read_bytes() + b"[]\n")
    tokenize([first, second], tmp_path / "out", tokenizer_dir, on_error="skip", workers=2, report=lambda message: None)
    assert (tmp_path / "out.skipped.txt").read_text().splitlines() == [
        f"{first}:1601: not valid JSON: Expecting property name enclosed in double quotes at column 2",
        f"{second}:1601: the line is a list, not an object with the key 'text'",
    ]


def peak_memory(arguments: list[object]) -> int:
    """Bytes of the largest process of a command."""
    measure = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, timeout=500)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    command = [sys.executable, "-c", measure, sys.executable, "-m", "data_tools", "tokenize", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, tokenizer_dir: Path, corpus: Path, kind: str) -> None:
    """Also where all is in one file, in one row group; a text is 300 bytes."""
    peaks = []
    for copies in (160, 480):
        path = tmp_path / f"in.{kind}"
        if kind == "parquet":
            texts = texts_of(corpus)
            pq.write_table(pyarrow.table({"text": texts * copies}), path, row_group_size=10**9)
        else:
            content = corpus.read_bytes() * copies
            path.write_bytes(gzip.compress(content, 1) if kind == "jsonl.gz" else content)
        arguments = [path, "--output", tmp_path / "out", "--tokenizer", tokenizer_dir, "--workers", 2, "--overwrite"]
        peaks.append(peak_memory(arguments))
    assert peaks[1] < 1.15 * peaks[0], peaks


@pytest.mark.slow
def test_a_line_of_100_megabytes(tmp_path: Path, tokenizer_dir: Path, corpus: Path) -> None:
    """Longer than several shards, between lines of usual length."""
    text = "".join(texts_of(corpus)) * 240
    assert len(text) > 100e6
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([GOOD, json.dumps({"text": text}).encode(), GOOD]))
    arguments = [path, "--output", tmp_path / "out", "--tokenizer", tokenizer_dir, "--engine", "fastokens"]
    assert peak_memory(arguments) < 2e9
    index = open_index(tmp_path / "out")
    assert index.documents == 3
    assert load_tokenizer(tokenizer_dir)[0].decode(index.map_tokens()[-4:-1].tolist()).endswith("d")


def test_refused_before_anything_is_written(
    tmp_path: Path, tokenizer_dir: Path, jsonl: Callable[..., Path], tree: Tree
) -> None:
    good, only_empty = jsonl("good.jsonl", GOOD), jsonl("only_empty.jsonl", b'{"text": ""}')
    (tmp_path / "taken.idx").touch()
    before = tree(tmp_path)

    def refused(message: str, source: Path = good, output: str = "out", **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            tokenize([source], tmp_path / output, options.pop("tokenizer_dir", tokenizer_dir), **options)
        assert tree(tmp_path) == before

    refused("taken.idx exists; .*--overwrite", output="taken")
    refused("no documents in the inputs: 1 empty, 0 broken", only_empty)
    refused("missing.jsonl: no such file", tmp_path / "missing.jsonl")
    refused("tokenizer.json: no such file", tokenizer_dir=tmp_path)
    refused("workers is 0", workers=0)
    refused("on_error is 'ignore'", on_error="ignore")
    refused("cannot write .*good.jsonl/out.partial", output="good.jsonl/out")


def test_overwrite_replaces_only_on_success(tmp_path: Path, tokenizer_dir: Path, jsonl: Callable[..., Path]) -> None:
    good, longer, broken = jsonl("a.jsonl", GOOD), jsonl("b.jsonl", GOOD, GOOD), jsonl("c.jsonl", GOOD, b"{")
    tokenize([good], tmp_path / "out", tokenizer_dir)
    before = content(tmp_path / "out")
    with pytest.raises(InputError):
        tokenize([broken], tmp_path / "out", tokenizer_dir, overwrite=True)
    assert content(tmp_path / "out") == before
    tokenize([longer], tmp_path / "out", tokenizer_dir, overwrite=True)
    assert read_index(tmp_path / "out").documents == 2


def test_progress_ends_at_the_size_of_the_inputs(
    tmp_path: Path, tokenizer_dir: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    seen: list[tuple[int, int]] = []
    tokenize([corpus], tmp_path / "out", tokenizer_dir, progress=lambda *amounts: seen.append(amounts))
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == (corpus.stat().st_size,) * 2
