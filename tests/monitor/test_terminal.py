"""The bar of a run, below its lines, on a terminal of the real training command."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.pseudo_terminal import PseudoTerminal
from tests.support import REPO, environment, small_run, write_run
from tests.warm import Command, Process, wait

LINE = r"step +\d+/\d+ \| (stable|decay) \| .* \| balance [\d.]+/[\d.]+ \| load [\d.]+/[\d.]+ \| .* left"


def start(
    terminal: PseudoTerminal, run_file: Path, *overrides: str, stdout: Path | None = None, kind: str = "xterm"
) -> list[Process]:
    command = Command(["pretrain", run_file, *overrides], environment() | {"TERM": kind}, REPO)
    return command.start(1, stdout or terminal.path, terminal.path)


def bars(text: str) -> list[str]:
    return re.findall(r"\r( *\d+%\|[^\r]*)", text)


def run_file_of(tmp_path: Path, data: dict, steps: int = 8) -> Path:
    held_out = {"data": [{"name": "v", "path": data["held_out"]}], "sequences": 4, "every_steps": 2}
    tree = small_run(tmp_path, data, evaluation=held_out, phases__0__tokens=256 * (steps - 3))
    return write_run(tmp_path, tree)


@pytest.mark.parametrize("columns", [400, 60])
def test_the_bar_is_below_the_lines(tmp_path: Path, data: dict, columns: int) -> None:
    with PseudoTerminal(columns) as terminal:
        options = [
            "logging.every_steps=2",
            "checkpoint.every_tokens=512",
            "alarms.load=1.0001",
            "logging.router_every_steps=2",
        ]
        status = wait(start(terminal, run_file_of(tmp_path, data), *options), 120)
    assert status == 0 and terminal.screen[-1] == ""
    for line in ["step 2/8 ", "step 4/8 ", "step 6/8 ", "step 8/8 "]:
        (at,) = [row for row in terminal.screen if row.startswith(line)]
        assert columns == 60 or re.fullmatch(LINE, at)
    assert sum(row.startswith("alarm: step ") for row in terminal.screen) >= 1
    assert not any("%|" in row for row in terminal.screen)  # all bars were written over
    last = bars(terminal.text)[-1]
    assert max(len(bar) for bar in bars(terminal.text)) < columns
    assert last.startswith("100%|██████████| 8/8 | loss ")
    assert not any(bar.rstrip().endswith("/8 |") for bar in bars(terminal.text)[1:])  # the first step's has its numbers
    for part in (" left | ", " tokens/s | ", " | balance ", " | load ", " | held-out ", " | saved 1.54 ktokens"):
        assert part in last or columns == 60, part


def test_lines_alone_in_a_pipe(tmp_path: Path, data: dict) -> None:
    with PseudoTerminal() as terminal:
        status = wait(start(terminal, run_file_of(tmp_path, data), stdout=tmp_path / "out", kind="dumb"), 120)
    assert status == 0 and terminal.text == ""
    lines = [line for line in (tmp_path / "out").read_text().splitlines() if line.startswith("step")]
    assert len(lines) == 1 and re.fullmatch(LINE, lines[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_a_clean_terminal(tmp_path: Path, data: dict, number: int) -> None:
    """Also after the terminal has become narrower."""
    with PseudoTerminal(300) as terminal:
        processes = start(terminal, run_file_of(tmp_path, data, steps=3000), "evaluation.every_steps=0")
        while not bars(terminal.text):
            assert processes[0].is_alive()
        terminal.resize(100)
        os.kill(processes[0].pid, number)
        assert wait(processes, 120) == 75
    *_, stopped, last = terminal.screen
    assert last == "" and stopped.startswith("stopped at ")
