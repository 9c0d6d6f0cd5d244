"""Progress on stderr: a bar on a terminal, lines elsewhere, nothing for short work. stdout stays what it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools import indexed, progress, shards
from data_tools.progress import above
from tests.data_tools.datasets import by_hand, random_documents
from tests.pseudo_terminal import PseudoTerminal
from tests.support import REPO, environment
from tests.warm import Command, wait

HOSTILE = "a\x1b[2Jb"


def at_once() -> None:
    """In the process of a command: even the shortest work is shown, and is done in many parts."""
    progress.BAR_AFTER = progress.LINE_EVERY = 0
    shards.SHARD_BYTES, indexed._CHUNK, indexed._COPY_BYTES = 50_000, 1000, 1000


@pytest.fixture
def commands(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> dict[str, list[object]]:
    """What each shows, and the command."""
    sets = [by_hand(tmp_path / name, random_documents(200, seed)) for seed, name in enumerate("ab")]
    split = ["--train", tmp_path / "train", "--held-out", tmp_path / "held", "--fraction", "0.2"]
    return {
        "tokenizing": ["tokenize", corpus, "--output", tmp_path / "set", "--tokenizer", tokenizer_dir],
        "reading texts": ["tokenizer", corpus, "--output", tmp_path / "bpe", "--vocab-size", "300"],
        "merging": ["merge", *sets, "--output", tmp_path / "merged"],
        "splitting": ["split", sets[0], *split],
        "checking": ["inspect", sets[0], "--check"],
    }


WORK = ["tokenizing", "reading texts", "merging", "splitting", "checking"]


def run(arguments: list[object], before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    return Command(["data_tools", *arguments], environment(), REPO, before).run()


def on_a_terminal(
    arguments: list[object], stdout: Path, before: Callable[[], None] | None = None, columns: int = 80
) -> PseudoTerminal:
    """The command with its stderr on a terminal."""
    with PseudoTerminal(columns) as terminal:
        command = Command(["data_tools", *arguments], environment() | {"TERM": "xterm"}, REPO, before)
        wait(command.start(1, stdout, terminal.path), 60)
    return terminal


@pytest.mark.parametrize("what", WORK)
def test_a_bar_on_a_terminal(commands: dict, what: str, tmp_path: Path) -> None:
    terminal = on_a_terminal(commands[what], tmp_path / "out", at_once)
    assert re.search(rf"\r{what}: +\d+%\|.*\|.*k/.*k \[.*B/s\]", terminal.text)
    assert terminal.screen == [""]
    assert f"{what}: " not in (tmp_path / "out").read_text() != ""


@pytest.mark.parametrize("what", WORK)
def test_lines_elsewhere(commands: dict, what: str) -> None:
    ended = run(commands[what], at_once)
    assert ended.returncode == 0 and f"{what}: " not in ended.stdout != ""
    amount = r"[\d.]+ k?B"
    lines = ended.stderr.splitlines()
    assert len(lines) > 1
    for line in lines[1:]:
        assert re.fullmatch(rf"{what}: {amount} of {amount}, [\d.e+]+ [kMGT]?B/s, \d+s left", line), line
    assert re.match(rf"{what}: ({amount}) of \1, .*, 0s left", lines[-1])


@pytest.mark.parametrize("what", WORK)
def test_nothing_for_short_work(commands: dict, what: str, tmp_path: Path) -> None:
    assert run(commands[what]).stderr == ""
    again = [*commands[what], *([] if what == "checking" else ["--overwrite"])]
    assert on_a_terminal(again, tmp_path / "out").text == ""


def test_row_groups_of_a_table_add_up_to_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.table({"text": [f"{n} " * n for n in range(300)]})
    pyarrow.parquet.write_table(texts, tmp_path / "a.parquet", row_group_size=20)
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    sizes = [shard.size for shard in shards.cut([tmp_path / "a.parquet"])]
    assert len(sizes) > 3 and all(sizes) and sum(sizes) == (tmp_path / "a.parquet").stat().st_size


def test_messages_stand_above_the_bar(tmp_path: Path, tokenizer_dir: Path) -> None:
    lines = [json.dumps({"text": f"text {n} " * 50}) if n % 50 else "{broken" for n in range(500)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["tokenize", tmp_path / "in.jsonl", "--output", tmp_path / "set", "--tokenizer", tokenizer_dir]
    terminal = on_a_terminal([*arguments, "--on-error", "skip"], tmp_path / "out", at_once, columns=400)
    assert terminal.text.count("tokenizing: ") > 3
    *messages, last = terminal.screen
    assert len(messages) == 10 and last == ""
    assert all(message.startswith("skipped: ") for message in messages)


def test_an_interrupt_leaves_a_clean_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "BAR_AFTER", 0)
    with PseudoTerminal() as terminal, open(terminal.descriptor, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with pytest.raises(KeyboardInterrupt), progress.progress(HOSTILE, "things") as show:
            show(0, 4)
            raise KeyboardInterrupt
        above("stopped", stderr)
    assert "0/4" in terminal.text and "things/s" in terminal.text
    assert "\x1b[2J" not in terminal.text and r"a\x1b[2Jb: " in terminal.text
    assert terminal.screen == ["stopped", ""]


def test_a_terminal_that_can_only_append_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    with PseudoTerminal() as terminal, open(terminal.descriptor, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress.progress(HOSTILE, "things") as show:
            show(1, 4)
            show(3, 4)
    first, second, _ = terminal.screen
    assert first == r"a\x1b[2Jb: 1 things of 4 things"
    assert second.startswith(r"a\x1b[2Jb: 3 things of 4 things, ") and second.endswith(" things/s, 0s left")


def test_lines_come_every_30_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert progress.LINE_EVERY == 30
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress.progress("working", "things") as show:
        for second in range(91):
            now = 100.0 + second
            show(1000 + second, 2000)  # 1000 were done before
    assert capsys.readouterr().err.splitlines() == [
        "working: 1,030 things of 2,000 things, 1 things/s, 16m 10s left",
        "working: 1,060 things of 2,000 things, 1 things/s, 15m 40s left",
        "working: 1,090 things of 2,000 things, 1 things/s, 15m 10s left",
    ]


def test_work_that_begins_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress.progress("working", "things") as show:
        for second, done in ((0, 1000), (30, 0), (60, 30)):
            now = second
            show(done, 90)
    said = ["working: 0 things of 90 things", "working: 30 things of 90 things, 1 things/s, 1m 00s left"]
    assert capsys.readouterr().err.splitlines() == said
