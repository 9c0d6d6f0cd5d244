"""What a job's script asks before and after each start."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from jetmoe_megatron.launch.starts import events
from tests.support import command, small_run, write_run


@pytest.fixture
def run_file(tmp_path: Path, data: dict[str, str]) -> Path:
    return write_run(tmp_path, small_run(tmp_path, data))


def job(*arguments: object) -> CompletedProcess[str]:
    return command(sys.executable, "-m", "jetmoe_megatron.launch.job", *map(str, arguments))


def begin(run_file: Path, start: str) -> Path:
    result = job("begin", start, "--nodes", "n1,n2", run_file)
    assert (result.returncode, result.stderr) == (0, "")
    return Path(result.stdout.strip())


def end(run_file: Path, start: str, status: int, *options: str) -> tuple[str, str]:
    result = job("end", start, "--status", status, "--most", 2, *options, run_file)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("\n") == 1
    return result.stdout.rstrip("\n"), result.stderr


def test_starts_and_their_ends(run_file: Path, tmp_path: Path) -> None:
    logs = begin(run_file, "7-0")
    assert logs == tmp_path / "run/logs/7-0"
    (logs / "failed_nodes/n2").write_text("rank 3 on n2 was killed by SIGKILL")
    assert end(run_file, "7-0", 137)[0] == "again n2"
    (tmp_path / "run/checkpoints/tokens_4096").mkdir(parents=True)
    begin(run_file, "7-1")
    begin(run_file, "8-0")  # another job of this run
    assert "7-1 is not the last" not in end(run_file, "7-1", 75)[1]
    begin(run_file, "7-2")
    answer, line = end(run_file, "7-2", 1)
    assert answer == "stop " and "2 starts saved no new checkpoint" in line
    history = list(events(tmp_path / "run/starts.jsonl"))
    assert [(e["event"], e["start"], e["tokens"]) for e in history] == [
        ("start", "7-0", 0), ("end", "7-0", 0), ("start", "7-1", 4096), ("start", "8-0", 4096),
        ("end", "7-1", 4096), ("start", "7-2", 4096), ("end", "7-2", 4096),
    ]  # fmt: skip
    assert history[1]["failed_nodes"] == {"n2": "rank 3 on n2 was killed by SIGKILL"}


@pytest.mark.parametrize(
    ("status", "options", "left_out"),
    [(137, [], ["n2"]), (143, [], []), (138, [], []), (137, ["--requeued"], []), (75, [], [])],
)
def test_nodes_that_did_not_start_their_ranks(
    run_file: Path, tmp_path: Path, status: int, options: list[str], left_out: list[str]
) -> None:
    """Unless a signal ended what had just begun there."""
    logs = begin(run_file, "7-0")
    (logs / "nodes_that_came").mkdir()
    (logs / "nodes_that_came/n1").touch()
    end(run_file, "7-0", status, *options)
    *_, ended = events(tmp_path / "run/starts.jsonl")
    assert list(ended["failed_nodes"]) == left_out == ended["leave_out"]


def test_a_line_that_a_crash_cut_off(run_file: Path, tmp_path: Path) -> None:
    begin(run_file, "7-0")
    with (tmp_path / "run/starts.jsonl").open("a") as file:
        file.write('{"event": "end", "sta')
    begin(run_file, "7-1")
    assert end(run_file, "7-1", 4)[0] == "stop "


def test_a_cancelled_job(run_file: Path) -> None:
    begin(run_file, "7-0")
    assert end(run_file, "7-0", 75, "--cancelled")[0] == "stop "


def test_bad_input_is_one_line(run_file: Path, tmp_path: Path) -> None:
    run_file.write_text(run_file.read_text() + "nmae: x\n")
    result = job("begin", "7-0", "--nodes", "n1", run_file)
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_end_without_a_start(run_file: Path) -> None:
    result = job("end", "7-0", "--status", 0, "--most", 3, run_file)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith("starts.jsonl: 7-0 is not the last start of its job\n")


def test_no_torch_is_needed() -> None:
    """The host that runs a job's script may not have it, and it takes seconds to import."""
    program = "import sys, jetmoe_megatron.launch.job; print(json.dumps('torch' in sys.modules))"
    assert not json.loads(command(sys.executable, "-c", f"import json; {program}").stdout)
