"""`jetmoe status` of runs that train, ended, and never began."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from jetmoe_megatron.launch import queued
from jetmoe_megatron.launch.starts import Start, add_end, add_start, add_submitted
from jetmoe_megatron.launch.status import status
from tests.support import jetmoe, pretrain, small_run, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """Stopped after 6 of 8 steps."""
    folder = tmp_path_factory.mktemp("status")
    assert pretrain(1, write_run(folder, small_run(folder, data)), "debug.max_steps=6").returncode == 0
    return folder / "run"


def shown(folder: Path) -> dict[str, str]:
    result = jetmoe("status", folder)
    assert (result.returncode, result.stderr) == (0, "")
    rows = [re.split(r"\s{2,}", line, maxsplit=1) for line in result.stdout.splitlines()]
    return {name or str(number): value for number, (name, value) in enumerate(rows)}


def test_a_run_without_a_job(run: Path) -> None:
    rows = shown(run)
    assert rows["run"] == "small"
    assert rows["step"] == "6 of 8, 1,536 tokens, phase decay"
    assert rows["state"] == "done, up to debug.max_steps (6)"
    assert rows["checkpoint"].startswith(f"{run}/checkpoints/tokens_1536, ") and rows["checkpoint"].endswith(" ago")
    assert rows["time left"] == "0s, without restarts"
    assert "starts" not in rows and "warning" not in rows


@pytest.fixture
def unfinished(run: Path, tmp_path: Path) -> Path:
    """The same without its debug.max_steps."""
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("max_steps: 6", "max_steps: null"))
    return tmp_path / "run"


def test_starts_and_warnings(unfinished: Path) -> None:
    file = unfinished / "starts.jsonl"
    for number, reason in enumerate(("n2: rank 1 was killed", "cancelled")):
        add_start(file, Start(f"local-{number}", f"2026-01-0{number + 1}T00:00:00Z", 0, ["n1", "n2"]))
        add_end(file, f"local-{number}", time="t", tokens=0, again=number == 0, reason=reason)
    logs = unfinished / "logs/local-1"
    logs.mkdir(parents=True)
    (logs / "rank_0.log").write_text("fine\nwarning: a\nerror: \x1b[2Jb\n")
    (logs / "rank_1.log").write_text("warning: a\n")
    result = jetmoe("status", unfinished).stdout
    assert "state       stopped: cancelled\n" in result
    assert "starts      2, the last one at 2026-01-02T00:00:00Z\n" in result
    assert "n2: rank 1 was killed" in result
    assert result.endswith("warning     warning: a\n            error: \\x1b[2Jb\n")


def test_a_run_that_has_steps_left(unfinished: Path) -> None:
    rows = shown(unfinished)
    assert rows["state"].startswith("no job of its own is known")
    assert re.fullmatch(r"\d+s, without restarts", rows["time left"])


def test_a_run_that_is_done(unfinished: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((unfinished / "config.yaml").read_text())
    last = json.loads((unfinished / "metrics.jsonl").read_text().splitlines()[-1]) | {"step": 8, "tokens": 2048}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    assert shown(tmp_path)["state"] != "done"  # its last checkpoint is not there yet
    (tmp_path / "checkpoints/tokens_2048").mkdir(parents=True)
    assert shown(tmp_path)["state"] == "done"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no config.yaml; is it a run folder, and has the run begun?"),
        ({"config.yaml": "name: 3\n"}, "config.yaml: "),
        ({"config.yaml": None, "metrics.jsonl": '{"step": 1}\n'}, "metrics.jsonl: not the metrics of a run"),
    ],
)
def test_no_run_folder(run: Path, tmp_path: Path, files: dict[str, str | None], said: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text((run / name).read_text() if text is None else text)
    result = jetmoe("status", tmp_path)
    assert (result.returncode, result.stdout) == (2, "") and said in result.stderr and result.stderr.count("\n") == 1


def test_before_the_first_step(run: Path, tmp_path: Path) -> None:
    add_start(tmp_path / "starts.jsonl", Start("local-0", "2026-01-01T00:00:00Z", 0, ["n1"]))
    assert shown(tmp_path)["state"] == "start local-0 has not ended: see how long ago the last step was"


def test_many_lines_are_not_all_read(run: Path, tmp_path: Path) -> None:
    line = (run / "metrics.jsonl").read_text().splitlines()[-1]
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / "metrics.jsonl").write_text("broken\n" * 10 + f"{line}\n" * 5000)
    assert shown(tmp_path)["tokens/s"].endswith("(median of 100 steps)")


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program of this name comes first on PATH."""
    program = folder / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f'#!/usr/bin/env bash\necho "$@" >> {folder}/asked\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_a_submitted_job_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job of the run has ended, the second one waits, the third one is not there any more."""
    reason = "ReqNodeNotAvail, UnavailableNodes:n1"
    squeue(tmp_path, monkeypatch, f"echo '8|PENDING|{reason}||0:00|1-00:00:00'")
    starts = tmp_path / "starts.jsonl"
    add_submitted(starts, "7")
    add_start(starts, Start("7-0", "2026-01-01T00:00:00Z", 0, ["n1"]))
    add_end(starts, "7-0", time="t", tokens=0, again=False, reason="cancelled")
    add_submitted(starts, "8")
    assert shown(tmp_path)["state"] == f"job 8: PENDING ({reason})"
    assert "--jobs=7,8 " in (tmp_path / "asked").read_text()


def test_a_job_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("7|RUNNING|None|n[1-2]|1:02:03|1-00:00:00", "8|PENDING|Priority||0:00|5:00")
    squeue(tmp_path, monkeypatch, "\n".join(f"echo '{line}'" for line in lines))
    starts = tmp_path / "starts.jsonl"
    for job in ("7", "8"):
        add_submitted(starts, job)
    assert shown(tmp_path)["state"] == "job 7 runs on n[1-2] for 1:02:03 of 1-00:00:00; job 8: PENDING (Priority)"


@pytest.mark.parametrize("script", ["echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "exit 0"])
def test_a_job_that_is_not_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    squeue(tmp_path, monkeypatch, script)
    add_submitted(tmp_path / "starts.jsonl", "7")
    rows = shown(tmp_path)
    assert re.fullmatch(r"job 7 was submitted at \S+Z, never began, and is not in the queue", rows["state"])
    assert "queue" not in rows


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("sleep 60", "squeue did not answer in 1 s"),
        ("echo 'error: \033[2JUnable to contact slurm controller' >&2; exit 1", "squeue: error: "),
        ("exit 3", "squeue: exit status 3"),
        ("echo nonsense", "squeue: not understood: nonsense"),
    ],
)
def test_a_queue_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    squeue(tmp_path, monkeypatch, script)
    monkeypatch.setattr(queued, "_ANSWERS", 1.0)
    add_submitted(tmp_path / "starts.jsonl", "7")
    state, queue = status(tmp_path).splitlines()
    assert state.startswith("state  job 7 was submitted at ") and state.endswith("Z, and had not begun")
    assert queue.startswith(f"queue  {said}") and "\x1b" not in queue


def test_a_real_queue_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's own squeue, of a cluster whose controller does not run."""
    if not shutil.which("squeue"):
        pytest.skip("there is no squeue here")
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=gone\nSlurmctldHost=localhost\nSlurmctldPort=1\nMessageTimeout=2\nAuthType=auth/none\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))
    add_submitted(tmp_path / "starts.jsonl", "7")
    assert status(tmp_path).splitlines()[1].startswith("queue  squeue")
