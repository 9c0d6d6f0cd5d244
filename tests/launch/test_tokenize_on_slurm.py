"""`jetmoe launch tokenize` on a real SLURM of three virtual nodes: tasks that come back, and tasks that do not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from data_tools.tokenize import tokenize
from data_tools.tokenizer import train_bpe
from tests.launch.test_virtual_cluster import start_at_once, state, wait_until
from tests.launch.virtual_cluster import SKIP, of_jobs, slurm, virtual_cluster
from tests.support import command

pytestmark = [pytest.mark.skipif(bool(SKIP), reason=SKIP), pytest.mark.slow]

FILES = 30
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with virtual_cluster(tmp_path_factory.mktemp("cluster")):
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 20 MB, which takes some seconds with the slow engine, and a tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "corpus").mkdir()
    for number in range(FILES):
        texts = [f"document {number} {i}: {'words of some kind, ' * (1 + i % 60)}{i * 7919}" for i in range(1000)]
        path = folder / f"corpus/{number:02}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_bpe([folder / "corpus/00.jsonl"], 300, folder / "tokenizer")
    return folder


def submit(folder: Path, inputs: Path, *options: object, **site: object) -> tuple[str, str]:
    """Returns the numbers of the array and of the job that merges."""
    values = {"gpus_per_node": 0, "cpus_per_node": 2, "exclusive": False, "time": "0:30:00", "warning_seconds": 60}
    (folder / "site.yaml").write_text(yaml.safe_dump({**values, **site}))
    arguments = ["--output", folder / "web", "--tokenizer", inputs / "tokenizer", "--site", folder / "site.yaml"]
    result = command("jetmoe", "launch", "tokenize", inputs / "corpus", *arguments, "--parts", 3, *options)
    assert result.returncode == 0, result.stderr
    array, merge = re.match(r"job (\d+): 3 parts of \S+; job (\d+) merges them", result.stdout).groups()  # type: ignore[union-attr]
    return array, merge


def states(array: str) -> list[str]:
    return [state(f"{array}_{part}") for part in (1, 2, 3)]


def all_at_once(array: str) -> list[str]:
    """The states, after those that wait only because they were queued again were told to start."""
    for part in (1, 2, 3):
        start_at_once(f"{array}_{part}")
    return states(array)


def work_of(part: int) -> psutil.Process:
    for process in of_jobs():
        with suppress(psutil.Error):
            if re.search(rf"-m data_tools tokenize .* --part {part}/3 ", " ".join(process.cmdline())):
                return process
    raise AssertionError(f"part {part} is not being made")


def test_tasks_that_are_killed_and_warned_come_back(tmp_path: Path, inputs: Path) -> None:
    array, merge = submit(tmp_path, inputs, "--engine", "tokenizers")
    begun = [tmp_path / f"web.part-{part}-of-3.partial/state.json" for part in (1, 2, 3)]
    wait_until(lambda: all(path.exists() for path in begun))
    assert {work_of(part).environ()["SLURMD_NODENAME"] for part in (1, 2, 3)} == {"n1", "n2", "n3"}
    work_of(2).kill()
    slurm("scancel", "--batch", "--signal=USR1", f"{array}_3")
    wait_until(lambda: states(array)[1:] == ["PENDING", "PENDING"])
    assert state(merge) == "PENDING"
    wait_until(lambda: all_at_once(array) == ["COMPLETED"] * 3)
    wait_until(lambda: state(merge) in ENDED)
    assert state(merge) == "COMPLETED", (tmp_path / f"web.tokenize/merge-{merge}.out").read_text()

    output = {part: (tmp_path / f"web.tokenize/part-{part}-job-{array}.out").read_text() for part in (1, 2, 3)}
    assert f"job {array}_2: it ended with status 137; it is queued again" in output[2]
    assert f"job {array}_3: the time limit is near; it is queued again" in output[3]
    assert "REQUEUE" not in output[1]  # SLURM's word for all tasks that it queues again
    assert all("note: continuing after the " in output[part] for part in (2, 3))
    tokenize([inputs / "corpus"], tmp_path / "whole", inputs / "tokenizer")
    for kind in ("bin", "idx"):
        assert (tmp_path / f"web.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
    assert not list(tmp_path.glob("web.part-*"))


def test_bad_input_is_not_tried_again(tmp_path: Path, inputs: Path) -> None:
    """Its task ends with 2, and nothing is merged. The lists of broken lines are joined if they are left out."""
    (inputs / "corpus/99.jsonl").write_text("{\n")
    try:
        array, merge = submit(tmp_path, inputs)
        wait_until(lambda: states(array) == ["COMPLETED", "COMPLETED", "FAILED"])
        assert "ExitCode=2:0" in slurm("scontrol", "show", "job", f"{array}_3")
        wait_until(lambda: state(merge) == "CANCELLED")
        assert not (tmp_path / "web.idx").exists()

        array, merge = submit(tmp_path, inputs, "--on-error", "skip")
        wait_until(lambda: state(merge) in ENDED)
        assert state(merge) == "COMPLETED"
        for part in (1, 2):
            assert "is already complete" in (tmp_path / f"web.tokenize/part-{part}-job-{array}.out").read_text()
        assert (tmp_path / "web.skipped.txt").read_text().startswith(f"{inputs}/corpus/99.jsonl:1: not valid JSON")
    finally:
        (inputs / "corpus/99.jsonl").unlink()


def test_a_task_that_always_fails_stops(tmp_path: Path, inputs: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\n[[ $1 == -c ]] || exit 7\n")
    python.chmod(0o755)
    array, merge = submit(tmp_path, inputs, python=str(python), starts_without_progress=1)
    wait_until(lambda: all_at_once(array) == ["FAILED"] * 3)
    wait_until(lambda: state(merge) == "CANCELLED")
    output = (tmp_path / f"web.tokenize/part-1-job-{array}.out").read_text()
    assert [line for line in output.splitlines() if line.startswith("job ")] == [
        f"job {array}_1: it ended with status 7; it is queued again",
        f"job {array}_1: it ended with status 7, and was queued again 1 times before: mend it, and submit it again",
    ]
