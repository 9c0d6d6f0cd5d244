"""A small corpus and a tokenizer trained on it, shared by the tests of data_tools."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from data_tools.__main__ import main
from data_tools.tokenizer import train_bpe

# Several scripts, text that looks like special tokens, bytes that byte-level BPE must keep.
TEXTS = [
    "def add(a, b):\n\treturn a + b\n",
    "  leading and trailing spaces  ",
    "Grüße, 世界! 🙂 e\u0301 \u2028 \ufeff zero\u200bwidth",
    "a </s> in the text, <s> and <unk> too",
    "line one\r\nline two\r\n\x00\x01\x7f",
    "don ' t do n't . , ! ?",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "x",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1600 documents, 480 KB of text: several batches."""
    texts = [f"{text} number {i} " * (1 + i % 13) for i in range(200) for text in TEXTS]
    return _write(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe([corpus], 400, folder)
    return folder


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """jsonl(name, *lines) writes raw lines, each ended by a newline."""

    def write(name: str, *lines: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    return _write(tmp_path / "in.jsonl", TEXTS)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """command(*arguments) runs `python -m data_tools` in this process: exit status, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["data_tools", *map(str, arguments)])
        status = main()
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def tree() -> Callable[[Path], list[str]]:
    """Everything below a folder, so that a test sees what was left behind."""
    return lambda folder: sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _write(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path
