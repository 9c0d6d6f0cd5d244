"""What follows a run's files, and what draws their numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from data_tools.progress import no_progress
from jetmoe_megatron.watch.drawing import cell, curve
from jetmoe_megatron.watch.tail import Tail, TakenBack
from jetmoe_megatron.watch.watched import Watched


def line(step: int) -> bytes:
    return json.dumps({"step": step, "tokens": 10 * step, "lm_loss": 1 / step}).encode() + b"\n"


def steps(tail: Tail) -> list[int]:
    return [found["step"] for found in tail.lines(no_progress)]


def test_each_line_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = Tail(file)
    assert steps(tail) == []
    file.write_bytes(line(1) + b"broken\n" + line(2) + line(3)[:10])
    assert steps(tail) == [1, 2]
    with open(file, "r+b") as stream:  # what was read is not read again, but for the last line
        stream.write(b"x" * len(line(1)))
        stream.seek(0, 2)
        stream.write(line(3)[10:] + line(4))
    assert steps(tail) == [3, 4] and steps(tail) == []


@pytest.mark.parametrize("how", ["shorter", "replaced", "repeated", "cut and grown"])
def test_lines_that_are_taken_back(tmp_path: Path, how: str) -> None:
    (tmp_path / "config.yaml").write_text("name: a\nbatch: {sequence_length: 10, global_tokens: 10}\nphases: []\n")
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"".join(map(line, range(1, 9))))
    tail, watched = Tail(file), Watched(tmp_path)
    steps(tail)
    watched.look()
    if how == "cut and grown":
        with open(file, "r+b") as stream:
            stream.truncate(len(b"".join(map(line, range(1, 8)))))
            stream.seek(0, 2)
            stream.write(line(8).replace(b'"tokens": 80', b'"tokens": 81') + line(9))
    elif how == "repeated":
        with open(file, "ab") as stream:
            stream.write(line(8) + line(9))
    else:
        aside = tmp_path / "aside"
        aside.write_bytes(b"".join(map(line, range(1, 6 if how == "shorter" else 12))))
        file.write_bytes(aside.read_bytes()) if how == "shorter" else aside.rename(file)
    with pytest.raises(TakenBack):
        steps(tail)
    watched.look()
    afresh = Watched(tmp_path)
    afresh.look()
    assert vars(watched.summary) == vars(afresh.summary) and watched.recent == afresh.recent
    assert len(watched.recent) == {"shorter": 5, "replaced": 11, "repeated": 9, "cut and grown": 9}[how]


def test_a_curve_keeps_the_least_and_the_most() -> None:
    flat = curve([1.0] * 1000, 10, 2)
    assert flat == ["\u2800" * 10, "⠉" * 10]
    spiked = curve([1.0] * 500 + [9.0] + [1.0] * 499, 10, 2)
    assert spiked == ["\u2800" * 5 + "⡇" + "\u2800" * 4, "⣀" * 5 + "⣇" + "⣀" * 4]
    assert curve([0.0, 1.0, math.nan, 3.0], 3, 1) == ["⡠⠈\u2800"]
    assert curve([math.nan, math.inf], 3, 2) == ["   ", "   "] and curve([], 3, 1) == ["   "]


def test_the_load_of_an_expert() -> None:
    loads = [0, -1, 1e-9, 0.25, 0.5, 0.8, 1.3, 2, 4, math.inf, math.nan]
    assert "".join(cell(load)[0] for load in loads) == "xx▁▁▃▄▅▆██?"
