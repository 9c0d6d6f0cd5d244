"""Which files the inputs name, and in which order."""

from pathlib import Path

import pytest

from data_tools.errors import InputError
from data_tools.inputs import find_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl.gz", "deep/er/c.jsonl", "notes.txt", "odd[1].jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "nothing").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (["b.jsonl", "a.jsonl.gz"], ["b.jsonl", "a.jsonl.gz"]),
        (["notes.txt"], ["notes.txt"]),
        (["odd[1].jsonl"], ["odd[1].jsonl"]),
        (["."], ["a.jsonl.gz", "b.jsonl", "deep/er/c.jsonl", "odd[1].jsonl"]),
        (["*.jsonl*"], ["a.jsonl.gz", "b.jsonl", "odd[1].jsonl"]),
        (["**/c.jsonl"], ["deep/er/c.jsonl"]),
        (["d*", "b.jsonl"], ["deep/er/c.jsonl", "b.jsonl"]),
    ],
)
def test_files_in_order(folder: Path, inputs: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert [path.as_posix() for path in find_files(inputs)] == names


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["missing.jsonl"], "missing.jsonl: no such file or folder"),
        (["*.parquet"], "no file matches it"),
        (["nothing"], "nothing: no .jsonl or .jsonl.gz file in this folder"),
        (["b.jsonl", "."], "b.jsonl: named twice"),
    ],
)
def test_refused(folder: Path, inputs: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=message):
        find_files(inputs)
