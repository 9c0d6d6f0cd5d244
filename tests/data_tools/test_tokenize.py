"""From JSON lines to a dataset: the content, what is left out, and what is refused."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from data_tools import engines, shards
from data_tools.errors import InputError
from data_tools.indexed import read_index
from data_tools.partial import Stats
from data_tools.tokenize import tokenize

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
    texts = [json.loads(line)["text"] for line in corpus.open()]
    dataset = IndexedDataset(str(prefix))
    assert len(dataset) == len(texts) == stats.documents
    for i in range(0, len(texts), 7):
        assert dataset[i].tolist() == [*theirs.encode(texts[i]), 2]
    assert read_index(prefix).dtype == np.uint16
    assert stats.tokens == read_index(prefix).tokens
    assert stats.bytes == sum(len(text.encode()) for text in texts)
    assert (stats.empty, stats.skipped) == (0, 0)
    assert stats.seconds > 0


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


def test_a_large_vocabulary_takes_four_bytes(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    monkeypatch.setattr(engines, "vocabulary_size", lambda tokenizer: 100_000)
    tokenize([text_file], tmp_path / "a", tokenizer_dir)
    assert read_index(tmp_path / "a").dtype == np.int32


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
    assert str(caught.value).endswith("; mend it, or leave such lines out with --on-error skip")
    assert tree(tmp_path) == ["in.jsonl"]

    messages: list[str] = []
    stats = tokenize([path], tmp_path / "out", tokenizer_dir, on_error="skip", report=messages.append)
    assert (stats.documents, stats.skipped) == (2, 1)
    assert len(messages) == 1 and messages[0].startswith(f"skipped: {path}{problem}")
    assert read_index(tmp_path / "out").documents == 2


def test_an_empty_file_stops_or_is_skipped(tmp_path: Path, tokenizer_dir: Path, jsonl: Callable[..., Path]) -> None:
    files = [jsonl("empty.jsonl"), jsonl("good.jsonl", GOOD)]
    with pytest.raises(InputError, match="empty.jsonl: the file is empty; mend it"):
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


def test_refused_before_anything_is_written(
    tmp_path: Path, tokenizer_dir: Path, jsonl: Callable[..., Path], tree: Tree
) -> None:
    good, only_empty = jsonl("good.jsonl", GOOD), jsonl("only_empty.jsonl", b'{"text": ""}')
    (tmp_path / "taken.idx").touch()
    before = tree(tmp_path)

    def refused(message: str, source: Path = good, output: str = "out", **options: object) -> None:
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


def test_progress_ends_with_the_result(
    tmp_path: Path, tokenizer_dir: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    seen: list[int] = []
    stats = tokenize([corpus], tmp_path / "out", tokenizer_dir, progress=lambda stats: seen.append(stats.documents))
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == stats.documents
