"""The commands as a user runs them: exit status, and one line on stderr."""

import argparse
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_tools.cli import add_parser
from data_tools.errors import InputError
from data_tools.indexed import IndexedWriter, read_index

COMMAND = [sys.executable, "-m", "data_tools"]
# The same with shards of a megabyte, the first of which is soon done.
SMALL_SHARDS = """
import sys
from data_tools import __main__, shards
shards.SHARD_BYTES = 1_000_000
sys.exit(__main__.main())
"""
REPOSITORY = Path(__file__).parents[2]
Tree = Callable[[Path], list[str]]


def run(*arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=REPOSITORY)


def test_train_a_tokenizer_and_tokenize(tmp_path: Path, text_file: Path) -> None:
    trained = run("tokenizer", text_file, "--output", tmp_path / "bpe", "--vocab-size", 300)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert "vocabulary of 300, " in trained.stdout and trained.stdout.count("\n") == 1

    done = run("tokenize", text_file, "--output", tmp_path / "out", "--tokenizer", tmp_path / "bpe", "--workers", 2)
    assert (done.returncode, done.stderr) == (0, "")
    index = read_index(tmp_path / "out")
    assert f"out: {index.documents} documents, {index.tokens} tokens, " in done.stdout
    assert done.stdout.endswith("; left out: 0 empty, 0 broken\n") and done.stdout.count("\n") == 1


def test_bad_input_is_one_line_and_status_2(tmp_path: Path, tokenizer_dir: Path, tree: Tree) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "good"}\n{\n')
    failed = run("tokenize", path, "--output", tmp_path / "out", "--tokenizer", tokenizer_dir)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith(f"error: {path}:2: not valid JSON: ")
    assert failed.stderr.count("\n") == 1
    assert tree(tmp_path) == ["in.jsonl"]

    failed = run("tokenizer", path, "--output", tmp_path / "bpe", "--vocab-size", 300)
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"error: {path}:2: not valid JSON: ")
    assert tree(tmp_path) == ["in.jsonl"]


def test_bad_usage_is_status_2() -> None:
    assert run("tokenize").returncode == 2
    assert run().returncode == 2


@pytest.fixture
def running(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> subprocess.Popen[bytes]:
    """A command with a minute's work before it, which has already saved some."""
    (tmp_path / "in.jsonl").write_bytes(corpus.read_bytes() * 300)
    command = [sys.executable, "-c", SMALL_SHARDS, *long_run(tmp_path, tokenizer_dir)]
    # A shell starts what runs in the background with Ctrl-C ignored, which would be inherited.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.PIPE, preexec_fn=heard
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "out.partial" / "state.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process


def long_run(folder: Path, tokenizer_dir: Path) -> list[str]:
    files = [str(folder / "in.jsonl"), "--output", str(folder / "out"), "--tokenizer", str(tokenizer_dir)]
    return ["tokenize", *files, "--workers", "2", "--engine", "tokenizers"]


def test_an_interrupt_keeps_what_is_done(running: subprocess.Popen[bytes], tmp_path: Path, tree: Tree) -> None:
    """Ctrl-C reaches the whole process group. stderr ends once no process holds it, workers included."""
    os.killpg(running.pid, signal.SIGINT)
    sent = time.monotonic()
    _, errors = running.communicate(timeout=120)
    assert time.monotonic() - sent < 20  # and not when all is done
    assert running.returncode == 130
    said = r"stopped: ([1-9]\d*) documents are done, up to file 1 of 1, and kept in (.*); run the same command again to"
    match = re.fullmatch(said + " continue\n", errors.decode())
    assert match is not None, errors
    state = json.loads((tmp_path / "out.partial/state.json").read_text())
    assert (int(match[1]), match[2]) == (state["documents"], f"{tmp_path}/out.partial")
    assert "out.bin" not in tree(tmp_path)


def interrupted(arguments: list[str | Path], started: Callable[[], bool]) -> tuple[int, str]:
    """The exit status and stderr of a command that gets a Ctrl-C once it has started to write."""
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    deadline = time.monotonic() + 60
    while not started():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("command", ["tokenize", "tokenizer", "merge", "split"])
def test_an_interrupt_before_anything_is_kept(
    command: str, tmp_path: Path, corpus: Path, tokenizer_dir: Path, tree: Tree
) -> None:
    """One line says so, and it is true."""
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes() * 100, 1))  # one part, and so none done
    for name in "ab":
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add_documents(np.full(50_000_000, 5, np.uint16), [1000] * 50_000)
    before = tree(tmp_path)
    arguments: dict[str, list[str | Path]] = {
        "tokenize": [tmp_path / "in.jsonl.gz", "--tokenizer", tokenizer_dir, "--output", tmp_path / "out"],
        "tokenizer": [tmp_path / "in.jsonl.gz", "--vocab-size", "4000", "--output", tmp_path / "out"],
        "merge": [tmp_path / "a", tmp_path / "b", "--output", tmp_path / "out"],
        "split": [tmp_path / "a", "--train", tmp_path / "c", "--held-out", tmp_path / "d", "--fraction", "0.5"],
    }
    began = time.monotonic()

    def started() -> bool:
        if command == "tokenizer":  # which writes at its end alone
            return time.monotonic() > began + 1
        files = tmp_path.glob("out.partial/parts-*/*" if command == "tokenize" else "*.tmp-*")
        return any(file.stat().st_size for file in files)

    status, errors = interrupted([command, *arguments[command]], started)
    assert (status, errors) == (130, "stopped: nothing was written\n")
    assert tree(tmp_path) == before


def test_a_second_process_is_refused(running: subprocess.Popen[bytes], tmp_path: Path, tokenizer_dir: Path) -> None:
    failed = run(*long_run(tmp_path, tokenizer_dir))
    assert failed.returncode == 2, failed.stdout
    message = f"error: {tmp_path}/out.partial is in use: another process is making this dataset\n"
    assert failed.stderr == message
    running.kill()
    running.communicate(timeout=120)


def test_workers_end_with_a_killed_parent(running: subprocess.Popen[bytes]) -> None:
    running.kill()
    running.communicate(timeout=20)  # until the last process that could write there is gone
    assert running.returncode == -signal.SIGKILL


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jetmoe")
    add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(arguments)


@pytest.mark.parametrize("command", ["tokenize", "tokenizer"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("data", command, "--help")
    assert caught.value.code == 0
    assert f"example:\n  jetmoe data {command} " in capsys.readouterr().out


def test_the_parser_leaves_a_function_that_lets_input_errors_through(tmp_path: Path) -> None:
    args = parse("data", "tokenize", "missing.jsonl", "--output", str(tmp_path / "a"), "--tokenizer", "b")
    with pytest.raises(InputError, match="missing.jsonl: no such file"):
        args.run(args)
