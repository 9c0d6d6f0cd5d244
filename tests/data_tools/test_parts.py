"""Parts, tokenized on their own and merged, are the dataset of one machine."""

import gzip
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools import partial as partial_module
from data_tools.errors import InputError
from data_tools.inputs import find_files
from data_tools.merge import merge
from data_tools.parts import Part, PartIsComplete, split
from data_tools.tokenize import tokenize
from tests.data_tools.test_restart import COMMAND, REPOSITORY, content

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def texts_folder(tmp_path: Path, corpus: Path) -> Path:
    """Seven files of uneven sizes; one is compressed, and one has only empty texts."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = corpus.read_bytes().splitlines(keepends=True)
    bounds = [0, 5, 600, 601, 800, 1400, 1600]
    for number in range(6):
        (folder / f"{number}.jsonl").write_bytes(b"".join(lines[bounds[number] : bounds[number + 1]]))
    (folder / "4.jsonl.gz").write_bytes(gzip.compress((folder / "4.jsonl").read_bytes()))
    (folder / "4.jsonl").unlink()
    (folder / "2b.jsonl").write_bytes(b'{"text": ""}\n' * 3)
    return folder


def dataset(prefix: object) -> list[bytes]:
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")]


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_merged_they_equal_one_machine(
    tmp_path: Path, texts_folder: Path, tokenizer_dir: Path, command: Run, parts: int
) -> None:
    tokenize([texts_folder], tmp_path / "want", tokenizer_dir)
    prefixes = [f"{tmp_path}/out.part-{number}-of-{parts}" for number in range(1, parts + 1)]
    for number in reversed(range(1, parts + 1)):
        options = ["--output", tmp_path / "out", "--tokenizer", tokenizer_dir, "--part", f"{number}/{parts}"]
        status, said, error = command("tokenize", texts_folder, *options)
        assert status == 0 and said.startswith(f"{prefixes[number - 1]}: "), error
    merge(prefixes, tmp_path / "out")
    assert dataset(tmp_path / "out") == dataset(tmp_path / "want")


def test_a_split_is_even_contiguous_and_leaves_no_part_empty() -> None:
    rng = random.Random(0)
    for _ in range(300):
        sizes = [rng.choice([0, 1, 5, 100, rng.randrange(10**12)]) for _ in range(rng.randrange(1, 9))]
        parts = rng.randrange(1, len(sizes) + 1)
        ends = split(sizes, parts)
        assert (ends[0], ends[-1], len(ends)) == (0, len(sizes), parts + 1)
        assert all(first < last for first, last in itertools.pairwise(ends))
        largest = max(sum(sizes[first:last]) for first, last in itertools.pairwise(ends))
        assert largest == smallest_possible(sizes, parts)


def smallest_possible(sizes: list[int], parts: int) -> int:
    if parts == 1:
        return sum(sizes)
    choices = range(1, len(sizes) - parts + 2)
    return min(max(sum(sizes[:first]), smallest_possible(sizes[first:], parts - 1)) for first in choices)


def test_a_killed_part_continues(tmp_path: Path, texts_folder: Path, tokenizer_dir: Path) -> None:
    arguments = ["tokenize", texts_folder, "--tokenizer", tokenizer_dir, "--part", "1/2", "--output", tmp_path / "out"]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, "2000", *map(str, arguments)], cwd=REPOSITORY)
    state = tmp_path / "out.part-1-of-2.partial/state.json"
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run(
        [sys.executable, "-c", COMMAND, "2000", *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert again.returncode == 0 and "note: continuing after the " in again.stderr
    tokenize([texts_folder], tmp_path / "want", tokenizer_dir, part=Part(1, 2))
    assert dataset(tmp_path / "out.part-1-of-2") == dataset(tmp_path / "want.part-1-of-2")


def test_a_complete_part_is_left_as_it_is(
    tmp_path: Path, texts_folder: Path, tokenizer_dir: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the process was killed while it gave the files their names."""
    options = ["--output", tmp_path / "out", "--tokenizer", tokenizer_dir, "--part", "2/2"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(partial_module, "_move", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        tokenize([texts_folder], tmp_path / "out", tokenizer_dir, part=Part(2, 2))
    assert command("tokenize", texts_folder, *options)[0] == 0
    before = (tmp_path / "out.part-2-of-2.idx").stat().st_mtime_ns
    assert command("tokenize", texts_folder, *options) == (0, f"{tmp_path}/out.part-2-of-2 is already complete\n", "")
    with pytest.raises(PartIsComplete):
        tokenize([texts_folder], tmp_path / "out", tokenizer_dir, part=Part(2, 2))
    assert (tmp_path / "out.part-2-of-2.idx").stat().st_mtime_ns == before


def test_parts_of_other_inputs_or_settings_are_refused(
    tmp_path: Path, texts_folder: Path, tokenizer_dir: Path, command: Run
) -> None:
    """They would be merged to a dataset with documents twice, or missing, and nobody would notice."""
    options = ["--output", tmp_path / "out", "--tokenizer", tokenizer_dir]
    assert command("tokenize", texts_folder, *options, "--part", "1/2")[0] == 0

    def refused(*arguments: object) -> str:
        status, said, error = command("tokenize", texts_folder, *options, *map(str, arguments))
        assert (status, said, error.count("\n")) == (2, "", 1)
        assert f"delete {tmp_path}/out.part-* and start all parts again" in error
        return error

    assert "has parts 2, not 3; " in refused("--part", "3/3")
    assert "has text_key 'text', not 'id'; " in refused("--part", "2/2", "--text-key", "id")
    (texts_folder / "9.jsonl").write_text(json.dumps({"text": "late"}) + "\n")
    assert f"has other inputs, without {texts_folder}/9.jsonl" in refused("--part", "2/2")
    assert "has other inputs" in refused("--part", "2/2", "--overwrite")
    for spoilt in ("{", "[]", '{"inputs": 1}'):
        (tmp_path / "out.part-settings.json").write_text(spoilt)
        assert "out.part-settings.json: cannot be read" in refused("--part", "2/2")


@pytest.mark.parametrize("part", ["", "1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", "٣/٤", f"1/{10**9}"])
def test_a_wrong_part_is_one_line(tmp_path: Path, corpus: Path, tokenizer_dir: Path, command: Run, part: str) -> None:
    options = ["--output", tmp_path / "out", "--tokenizer", tokenizer_dir, f"--part={part}"]
    status, said, error = command("tokenize", corpus, *options)
    assert (status, said) == (2, "") and error.startswith(f"error: --part {part}: write K/N") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_more_parts_than_files(tmp_path: Path, texts_folder: Path, corpus: Path, tokenizer_dir: Path) -> None:
    assert len(find_files([texts_folder])) == 7
    with pytest.raises(InputError, match=r"^8 parts of 7 input files: a part has whole files; use 1 to 7 parts, or "):
        tokenize([texts_folder], tmp_path / "out", tokenizer_dir, part=Part(8, 8))
    with pytest.raises(InputError, match=r"^2 parts of 1 input files: a part has whole files; only 1 part is possible"):
        tokenize([corpus], tmp_path / "out", tokenizer_dir, part=Part(1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_lists_of_broken_lines_join_too(tmp_path: Path, texts_folder: Path, tokenizer_dir: Path) -> None:
    with (texts_folder / "0.jsonl").open("a") as first, (texts_folder / "5.jsonl").open("a") as last:
        first.write("{\n")
        last.write("{\n{\n")
    tokenize([texts_folder], tmp_path / "want", tokenizer_dir, on_error="skip", report=lambda line: None)
    for number in (1, 2):
        part = Part(number, 2)
        tokenize([texts_folder], tmp_path / "out", tokenizer_dir, on_error="skip", report=lambda line: None, part=part)
    merge([Part(number, 2).prefix(tmp_path / "out") for number in (1, 2)], tmp_path / "out")
    lists = [Path(f"{Part(number, 2).prefix(tmp_path / 'out')}.skipped.txt").read_bytes() for number in (1, 2)]
    assert [*dataset(tmp_path / "out"), b"".join(lists)] == content(tmp_path / "want")
