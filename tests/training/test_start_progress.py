"""What rank 0 shows of the long work before a run's first step. Elsewhere than on a terminal: lines on stderr."""

from __future__ import annotations

import re
from pathlib import Path

from data_tools import progress
from tests.support import REPO, environment, small_run, training, write_run
from tests.warm import Command


def at_once() -> None:
    """In the process of a command: even the shortest work is shown."""
    progress.LINE_EVERY = 0


def shown(stderr: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"^(.*): [\d.]+ .* of .*/s.*$", stderr, re.M)))


def test_what_rank_0_shows_at_a_start(tmp_path: Path, data: dict) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    first = training(run_file, "debug.max_steps=4", before=at_once).run(ranks=2)
    assert first.returncode == 0 and shown(first.stderr) == ["building indices"], first.stderr
    again = training(run_file, before=at_once).run(ranks=2)
    assert again.returncode == 0 and "step 8/8" in again.stdout, again.stderr
    assert shown(again.stderr) == ["checking tokens_1024", "loading tokens_1024", "building indices"]
    for what in shown(again.stderr):  # to the end, and by one of the two ranks
        assert len(re.findall(rf"^{what}: (.*) of \1, .*$", again.stderr, re.M)) == 1


def test_prepare(tmp_path: Path, data: dict) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    ended = Command(["jetmoe", "data", "prepare", run_file], environment(), REPO, at_once).run()
    assert shown(ended.stderr) == ["building indices"] and "building" not in ended.stdout
    assert ended.stdout.count("built ") == 4


def test_convert(tmp_path: Path, data: dict) -> None:
    assert training(write_run(tmp_path, small_run(tmp_path, data))).run().returncode == 0
    for what, *arguments in (("converting", "to-hf", "run", "hf"), ("comparing", "verify", "run", "hf")):
        ended = Command(["jetmoe", "convert", *arguments], environment(), tmp_path, at_once).run()
        assert ended.returncode == 0 and shown(ended.stderr) == [what], ended.stderr
