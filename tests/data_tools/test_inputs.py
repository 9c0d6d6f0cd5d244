"""Which files the inputs name, and in which order."""

import os
from pathlib import Path

import pytest

from data_tools.errors import InputError
from data_tools.inputs import find_files, kind_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = ("texts/1.txt", "texts/2.txt.zst", "texts/out.skipped.txt", "mixed/a.txt", "mixed/b.parquet")
    for name in ("b.jsonl", "a.jsonl.gz", "deep/er/c.jsonl", "deep/t.parquet", "notes.md", "odd[1].jsonl", *texts):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "nothing").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (["b.jsonl", "a.jsonl.gz"], ["b.jsonl", "a.jsonl.gz"]),
        (["notes.md"], ["notes.md"]),
        (["odd[1].jsonl"], ["odd[1].jsonl"]),
        (["deep"], ["deep/er/c.jsonl", "deep/t.parquet"]),
        (["texts"], ["texts/1.txt", "texts/2.txt.zst"]),
        (["texts/out.skipped.txt"], ["texts/out.skipped.txt"]),
        (["mixed/*"], ["mixed/a.txt", "mixed/b.parquet"]),
        (["*.jsonl*"], ["a.jsonl.gz", "b.jsonl", "odd[1].jsonl"]),
        (["**/c.jsonl"], ["deep/er/c.jsonl"]),
        (["d*", "b.jsonl"], ["deep/er/c.jsonl", "deep/t.parquet", "b.jsonl"]),
    ],
)
def test_files_in_order(folder: Path, inputs: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert [path.as_posix() for path in find_files(inputs)] == names


def test_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To folders, also round and twice; one to nothing is not left out in silence."""
    monkeypatch.chdir(folder)
    (folder / "linked").mkdir()
    (folder / "linked/deep").symlink_to(folder / "deep")
    (folder / "linked/deep_again").symlink_to(folder / "deep")
    (folder / "linked/round").symlink_to(folder / "linked")
    (folder / "linked/d.jsonl").symlink_to(folder / "b.jsonl")
    names = ["linked/d.jsonl", "linked/deep/er/c.jsonl", "linked/deep/t.parquet"]
    assert sorted(path.as_posix() for path in find_files(["linked"])) == names
    (folder / "linked/gone.jsonl").symlink_to("/gone.jsonl")
    with pytest.raises(InputError, match="linked/gone.jsonl: a link to a file that is not there"):
        find_files(["linked"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["missing.jsonl"], "missing.jsonl: no such file or folder"),
        (["*.csv"], "no file matches it"),
        (["nothing"], "nothing: no .jsonl, .parquet, .txt file in this folder"),
        (["mixed"], "mixed: holds records and also text such as mixed/a.txt; name"),
        (["b.jsonl", "b*"], "b.jsonl: named twice"),
        (["pipe"], "pipe: not a file on a disk"),
    ],
)
def test_refused(folder: Path, inputs: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=message):
        find_files(inputs)


def test_kinds() -> None:
    names = ["a.jsonl", "a.jsonl.zst", "a", "a.json.gz", "a.txt", "a.txt.gz", "a.parquet", "txt", "a.txt.jsonl"]
    kinds = ["records"] * 4 + ["text"] * 2 + ["parquet"] + ["records"] * 2
    assert [kind_of(Path(name)) for name in names] == kinds
