"""Killed at any moment and run again, the command ends with the files of an uninterrupted run."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as pq
import pytest

from data_tools import shards
from data_tools import tokenize as module
from data_tools.errors import InputError
from data_tools.partial import Stats
from data_tools.tokenize import tokenize

REPOSITORY = Path(__file__).parents[2]
Tree = Callable[[Path], list[str]]
KINDS = ("bin", "idx", "skipped.txt")
# The command with many small shards, each saved when it is done.
COMMAND = """
import sys
from data_tools import __main__, shards, tokenize
shards.SHARD_BYTES, tokenize._COMMIT_SECONDS = int(sys.argv.pop(1)), 0
sys.exit(__main__.main())
"""


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in KINDS]


def quiet(message: str) -> None:
    pass


@pytest.fixture
def source(tmp_path: Path, corpus: Path) -> Path:
    """A megabyte with broken lines, so that there is a list of them."""
    lines = corpus.read_bytes().splitlines(keepends=True)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(line if i % 97 else b"{\n" for i, line in enumerate(lines * 2)))
    return path


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 50_000)
    monkeypatch.setattr(module, "_COMMIT_SECONDS", 0)


def test_killed_at_random_moments_with_other_numbers_of_workers(
    tmp_path: Path, source: Path, tokenizer_dir: Path
) -> None:
    arguments = [source, "--tokenizer", tokenizer_dir, "--on-error", "skip"]

    def start(output: str, workers: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", COMMAND, "50000", "tokenize", *arguments, "--output", tmp_path / output]
        return subprocess.Popen([*map(str, command), "--workers", str(workers)], cwd=REPOSITORY, stderr=subprocess.PIPE)

    began = time.monotonic()
    whole = start("want", 1)
    whole.communicate(timeout=120)
    duration = time.monotonic() - began
    assert whole.returncode == 0

    rng, kills, resumed = random.Random(0), 0, 0
    while kills < 10 or resumed < 3:
        began = time.monotonic()
        process = start("out", rng.choice([1, 2, 3]))
        try:
            _, errors = process.communicate(timeout=rng.uniform(0.3, 1.0) * duration)
            assert process.returncode == 0, errors
            duration = min(duration, time.monotonic() - began)  # what else the machine does may have ended meanwhile
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate(timeout=60)
            kills += 1
            if not (tmp_path / "out.partial" / "state.json").exists():
                duration *= 1.2  # it had no time for its first commit
        resumed += b"note: continuing after the " in errors
        if (tmp_path / "out.idx").exists() and not (tmp_path / "out.partial" / "state.json").exists():
            assert content(tmp_path / "out") == content(tmp_path / "want")
            for kind in KINDS:
                (tmp_path / f"out.{kind}").unlink()
    last = start("out", 2)
    last.communicate(timeout=120)
    assert last.returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "want")


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_each_step_that_reaches_the_disk(
    tmp_path: Path, tokenizer_dir: Path, corpus: Path, overwrite: bool
) -> None:
    """Also between the steps by which the files get their names: an index never stands beside another's data."""
    lines = corpus.read_bytes().splitlines(keepends=True)[:24]
    (tmp_path / "in.jsonl").write_bytes(b"".join([*lines, b"{\n"]))
    tokenize([tmp_path / "in.jsonl"], tmp_path / "want", tokenizer_dir, on_error="skip", report=quiet)
    (tmp_path / "older.jsonl").write_bytes(b"".join([b"[\n", *lines[:9]]))
    tokenize([tmp_path / "older.jsonl"], tmp_path / "old", tokenizer_dir, on_error="skip", report=quiet)

    command = [sys.executable, "-m", "tests.data_tools.crash_driver", str(tmp_path), str(tokenizer_dir)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *["--overwrite"] * overwrite],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) > 30
    for steps, killed, after_kill, status, at_end, left in results:
        assert killed == (0 if steps == len(results) - 1 else -signal.SIGKILL)
        bin_kind, idx_kind, _ = after_kill
        assert idx_kind in ("absent", bin_kind), after_kill
        assert at_end == ["want"] * 3, (steps, at_end)
        if status == 0:
            assert left == ["out.bin", "out.idx", "out.skipped.txt"], steps
        else:  # killed when all was done, so that the files were there
            assert not overwrite and after_kill == ["want"] * 3, steps


def test_an_interrupted_run_goes_on(
    tmp_path: Path, source: Path, tokenizer_dir: Path, small_shards: None, tree: Tree
) -> None:
    tokenize([source], tmp_path / "want", tokenizer_dir, on_error="skip", report=quiet)
    want = content(tmp_path / "want")
    seen: list[int] = []
    messages: list[str] = []

    def interrupt(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) in (5, 6):
            raise KeyboardInterrupt

    def run(prefix: Path, **options: Any) -> None:
        tokenize([source], prefix, tokenizer_dir, on_error="skip", report=messages.append, **options)

    with pytest.raises(KeyboardInterrupt) as stopped:
        run(tmp_path / "out", progress=interrupt)
    before = json.loads((tmp_path / "out.partial/state.json").read_text())
    assert before["read"] == seen[-1] > 0
    assert str(stopped.value) == (
        f"{before['documents']} documents are done, up to file 1 of 1, and kept in {tmp_path}/out.partial; "
        "run the same command again to continue"
    )
    assert not messages or not messages[-1].startswith("note: ")
    assert not (tmp_path / "out.bin").exists()
    for kind in ("bin", "lengths", "skipped"):  # what a kill leaves behind that was not saved
        with open(tmp_path / "out.partial" / kind, "ab") as stream:
            stream.write(b"\1\0\2\0" * 1000)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", workers=2, progress=interrupt)
    run(tmp_path / "out", progress=interrupt)
    assert f"note: continuing after the {before['documents']} documents in {tmp_path}/out.partial" in messages
    assert all(done > before["read"] for done in seen[5:]) and seen[-1] == source.stat().st_size
    assert content(tmp_path / "out") == want
    assert "out.partial" not in tree(tmp_path)


def test_other_settings_are_refused_by_name(
    tmp_path: Path, source: Path, tokenizer_dir: Path, small_shards: None, jsonl: Callable[..., Path]
) -> None:
    second = jsonl("second.jsonl", b'{"text": "more", "body": "x"}')

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    def run(*inputs: Path, **options: Any) -> Stats:
        arguments = {"on_error": "skip", "report": quiet, **options}
        return tokenize(inputs, tmp_path / "out", tokenizer_dir, **arguments)

    with pytest.raises(KeyboardInterrupt):
        run(source, second, progress=interrupt)
    state = (tmp_path / "out.partial" / "state.json").read_bytes()
    folder = f"{tmp_path}/out.partial"
    for message, inputs, options in (
        ("text_key 'text', not 'body'", (source, second), {"text_key": "body"}),
        ("append_eod True, not False", (source, second), {"append_eod": False}),
        ("engine 'auto', not 'tokenizers'", (source, second), {"engine": "tokenizers"}),
        (f"other inputs, also {second}", (source,), {}),
        (f"other inputs, without {tmp_path}/third.jsonl", (source, second, jsonl("third.jsonl", b"{}")), {}),
        ("its inputs in another order", (second, source), {}),
    ):
        with pytest.raises(InputError) as caught:
            run(*inputs, **options)
        assert str(caught.value) == (
            f"{folder} belongs to a run with {message}; use the same inputs and settings, or start from the beginning "
            "with --overwrite"
        )
    with pytest.raises(InputError, match="left out 2 broken lines; continue with --on-error skip"):
        run(source, second, on_error="fail")
    assert (tmp_path / "out.partial" / "state.json").read_bytes() == state
    os.utime(second, ns=(1, 1))
    with pytest.raises(InputError, match=f"belongs to a run with an older or newer {second}; "):
        run(source, second)
    assert run(second, overwrite=True).documents == 1
    assert not (tmp_path / "out.partial").exists()


def test_a_run_that_failed_goes_on_by_skipping(
    tmp_path: Path, tokenizer_dir: Path, corpus: Path, small_shards: None
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(corpus.read_bytes() + b"{\n" + corpus.read_bytes())
    messages: list[str] = []
    with pytest.raises(InputError, match="in.jsonl:1601: not valid JSON"):
        tokenize([path], tmp_path / "out", tokenizer_dir, report=messages.append)
    assert "out.partial keeps " in messages[-1]
    stats = tokenize([path], tmp_path / "out", tokenizer_dir, on_error="skip", report=messages.append)
    assert (stats.documents, stats.skipped) == (3200, 1)
    assert any("continuing after" in message for message in messages)
    tokenize([path], tmp_path / "want", tokenizer_dir, on_error="skip", report=quiet)
    assert content(tmp_path / "out") == content(tmp_path / "want")


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_lost_of_a_table_are_counted_alike_over_restarts(
    tmp_path: Path, tokenizer_dir: Path, small_shards: None, workers: int
) -> None:
    """Two damaged groups of 200 rows have one line each in the list."""
    path = tmp_path / "in.parquet"
    texts = [f"{i} {random.Random(i).random()}" for i in range(10_000)]
    pq.write_table(pyarrow.table({"text": texts}), path, row_group_size=200, use_dictionary=False, compression="none")
    damaged, content_of = (7, 30), bytearray(path.read_bytes())
    for group in damaged:
        at = pq.ParquetFile(path).metadata.row_group(group).column(0).data_page_offset
        content_of[at : at + 20] = b"\xff" * 20
    path.write_bytes(content_of)
    messages: list[str] = []
    seen = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt

    def run(**options: Any) -> Stats:
        arguments = {"on_error": "skip", "workers": workers, "report": messages.append, **options}
        return tokenize([path], tmp_path / "out", tokenizer_dir, **arguments)

    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt)
    stats = run()
    assert (stats.documents, stats.skipped) == (9_600, 400)
    listed = (tmp_path / "out.skipped.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in listed] == [f"{path}:{200 * group + 1}" for group in damaged]
    assert [f"skipped: {line}" for line in listed] == [line for line in messages if line.startswith("skipped")]


def test_nothing_stays_where_there_is_no_document(
    tmp_path: Path, tokenizer_dir: Path, small_shards: None, jsonl: Callable[..., Path], tree: Tree
) -> None:
    path = jsonl("in.jsonl", *[b'{"text": ""}'] * 10_000)
    with pytest.raises(InputError, match="no documents in the inputs: 10000 empty, 0 broken"):
        tokenize([path], tmp_path / "out", tokenizer_dir)
    assert tree(tmp_path) == ["in.jsonl"]


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, source: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="thesis.tex is not a file of this program"):
        tokenize([source], tmp_path / "out", tokenizer_dir, on_error="skip", overwrite=True, report=quiet)
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("name", ["state.json", "settings.json", "bin"])
def test_a_damaged_folder_is_one_line(
    tmp_path: Path, source: Path, tokenizer_dir: Path, small_shards: None, name: str
) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize([source], tmp_path / "out", tokenizer_dir, on_error="skip", report=quiet, progress=interrupt)
    (tmp_path / "out.partial" / name).write_bytes(b"[]")
    with pytest.raises(InputError, match="out.partial.* delete ") as caught:
        tokenize([source], tmp_path / "out", tokenizer_dir, on_error="skip", report=quiet)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_the_run_can_go_on(
    tmp_path: Path, source: Path, tokenizer_dir: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize([source], tmp_path / "want", tokenizer_dir, on_error="skip", report=quiet)
    real, calls = shutil.copyfileobj, 0

    def full(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(InputError, match="cannot write .*out.partial: No space left on device"):
        tokenize([source], tmp_path / "out", tokenizer_dir, on_error="skip", report=quiet)
    tokenize([source], tmp_path / "out", tokenizer_dir, on_error="skip", report=quiet)
    assert content(tmp_path / "out") == content(tmp_path / "want")


def test_a_disk_that_is_full_for_what_waits_in_memory(
    tmp_path: Path, tokenizer_dir: Path, tree: Tree, corpus: Path
) -> None:
    """Shards smaller than a buffer: the first that is written is written when the file is closed."""
    (tmp_path / "texts").mkdir()
    for number, line in enumerate(corpus.read_bytes().splitlines()[:100]):
        (tmp_path / f"texts/{number}.txt").write_bytes(line * 4)
    before = tree(tmp_path)
    command = [sys.executable, "-m", "data_tools", "tokenize", tmp_path / "texts", "--tokenizer", tokenizer_dir]
    ended = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "out")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, 2**15)),
    )
    assert ended.returncode == 1, ended.stderr  # it may pass
    assert ended.stderr == f"error: cannot write {tmp_path}/out.partial: File too large\n"
    assert tree(tmp_path) == before


def test_a_broken_line_after_much_that_was_good(
    tmp_path: Path, source: Path, tokenizer_dir: Path, small_shards: None
) -> None:
    """What is kept goes on without the line; mending it is another file."""
    lines = [line for line in source.read_bytes().splitlines(keepends=True) if line != b"{\n"]
    source.write_bytes(b"".join([*lines, b"{\n"]))
    notes: list[str] = []
    with pytest.raises(InputError) as caught:
        tokenize([source], tmp_path / "out", tokenizer_dir, report=notes.append)
    assert str(caught.value).endswith(
        "; fix the file and start from the beginning with --overwrite, or leave such lines out with --on-error skip"
    )
    assert notes[-1].endswith(" documents; the same command with --on-error skip continues from there")
    stats = tokenize([source], tmp_path / "out", tokenizer_dir, on_error="skip", report=quiet)
    assert (stats.documents, stats.skipped) == (len(lines), 1)
