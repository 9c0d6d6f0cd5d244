"""A run survives if its output cannot be written: a pipe without a reader, a full disk under its log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jetmoe_megatron.checkpoint.folder import published
from tests.support import REPO, environment, metrics, small_run, write_dataset, write_run


def train(run_file: Path, *overrides: str, output: int | None = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, "pretrain_jetmoe.py", str(run_file), "logging.every_steps=1", *overrides]
    return subprocess.Popen(command, cwd=REPO, env=environment(), stdout=output, stderr=subprocess.STDOUT, text=True)


def leave_at_the_first_step(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step"))
    process.stdout.close()


def test_it_goes_on_without_its_reader(tmp_path: Path, data: dict) -> None:
    skipped_step = ["guard.on_bad_step=skip", "evaluation.every_steps=1"]
    held_out = {"data": [{"name": "v", "path": data["held_out"]}], "sequences": 4}
    run_file = write_run(tmp_path, small_run(tmp_path, data, evaluation=held_out))
    process = train(run_file, "checkpoint.every_tokens=512", *skipped_step)
    leave_at_the_first_step(process)
    assert process.wait(120) == 0
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 9))


def test_a_name_that_the_terminal_cannot_show(tmp_path: Path, data: dict) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data, name="λ"))
    plan = subprocess.run(
        [sys.executable, "pretrain_jetmoe.py", str(run_file), "--dry-run"],
        cwd=REPO,
        env={**environment(), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert plan.returncode == 0, plan.stderr
    assert plan.stdout.startswith("run \\u03bb: ")


def test_it_goes_on_without_its_terminal(tmp_path: Path, data: dict) -> None:
    """As after `nohup`, or in a session of its own, which is not told that the terminal was closed."""
    ours, its = os.openpty()
    process = train(write_run(tmp_path, small_run(tmp_path, data, phases__0__tokens=256 * 100)), output=its)
    os.close(its)
    with open(ours, "rb", buffering=0) as terminal:
        shown = b""
        while b"step" not in shown:
            shown += terminal.read(1)
    assert process.wait(120) == 0
    assert len(metrics(tmp_path / "run")) == 103


def test_ctrl_c_that_ends_the_reader_too(tmp_path: Path, data: dict) -> None:
    """As in a terminal: `python pretrain_jetmoe.py run.yaml 2>&1 | tee log`."""
    run_file = write_run(tmp_path, small_run(tmp_path, data, phases__0__tokens=256 * 2000))
    process = train(run_file)
    leave_at_the_first_step(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 75
    steps = [record["step"] for record in metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))
    assert [path.name for path in published(tmp_path / "run/checkpoints")] == [f"tokens_{256 * len(steps)}"]


def test_a_full_disk_under_the_log(tmp_path: Path, data: dict) -> None:
    with open("/dev/full", "w") as full:
        process = train(write_run(tmp_path, small_run(tmp_path, data)), output=full.fileno())
        assert process.wait(120) == 0
    assert len(metrics(tmp_path / "run")) == 8


@pytest.mark.parametrize("last", [3, 8])
def test_the_last_step_is_shown(tmp_path: Path, data: dict, last: int) -> None:
    """Also where debug.max_steps makes another one the last; and what keeps a run from going on is named."""
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    overrides = ("logging.every_steps=100", f"debug.max_steps={last}")
    text, _ = train(run_file, *overrides).communicate(timeout=120)
    assert f"step {last}/{last} | " in text and "| 0s left" in text
    again, _ = train(run_file, *overrides).communicate(timeout=120)
    done = "debug.max_steps: 3 of 8 steps are done" if last == 3 else "all 8 steps are done"
    assert f"{done}, nothing left to do" in again


def unread(*arguments: object, unbuffered: str) -> tuple[int, str]:
    """Status and stderr of `jetmoe ...` whose stdout nobody reads."""
    command = [sys.executable, "-m", "jetmoe_megatron.cli", *map(str, arguments)]
    env = {**environment(), "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    return process.wait(60), process.stderr.read()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_output_is_not_read(tmp_path: Path, unbuffered: str) -> None:
    record = {"step": 1, "tokens": 256, "lm_loss": 4.5, "tokens_per_second": 10.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert unread("report", tmp_path, unbuffered=unbuffered) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_damage_is_told_also_where_the_report_is_not_read(tmp_path: Path, unbuffered: str) -> None:
    path = write_dataset(tmp_path / "set", 20, seed=0)
    os.truncate(f"{path}.bin", 100)
    status, error = unread("data", "inspect", path, "--check", "--json", unbuffered=unbuffered)
    assert status == 2 and error.startswith("error: ") and "set.bin: cut short" in error


def test_errors_closed_before_it_began(tmp_path: Path, data: dict) -> None:
    line = [sys.executable, "pretrain_jetmoe.py", str(write_run(tmp_path, small_run(tmp_path, data)))]
    script = 'exec "$@" 2>&-'
    ended = subprocess.run(["sh", "-c", script, "sh", *line], cwd=REPO, env=environment(), timeout=120, check=False)
    assert ended.returncode == 0 and len(metrics(tmp_path / "run")) == 8
