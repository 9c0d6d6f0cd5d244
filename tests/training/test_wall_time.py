"""The parts of a run's time add up to what a clock on the wall shows, over restarts and rollbacks."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.report.table import report
from jetmoe_megatron.training.wall_time import WallTime
from tests.injected_faults import Fault, pretrain_with
from tests.support import metrics, pretrain, small_run, training, write_run

PARTS = ("start_seconds", "step_seconds", "evaluation_seconds", "save_stall_seconds", "other_seconds")


def ended(record: dict[str, Any]) -> float:
    return datetime.strptime(record["time"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc).timestamp()


def check_sums(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert sum(record.get(part, 0.0) for part in PARTS) == pytest.approx(record["wall_seconds"])
        assert 0 <= record["data_wait_seconds"] <= record["step_seconds"]
    useful = sum(r["step_seconds"] - r["data_wait_seconds"] for r in records if "skipped" not in r)
    wall = sum(r["wall_seconds"] for r in records)
    assert wall == pytest.approx(records[-1]["run_seconds"], abs=0.01)  # `time` has milliseconds
    hours = [r["rank_hours"] for r in records]
    assert hours == sorted(hours) and hours[0] > 0
    assert records[-1]["goodput"] == pytest.approx(useful / wall, rel=1e-2)


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> tuple[Path, float]:
    """A run that is killed twice and skips a step, and how long it took from its first process to its last line."""
    folder = tmp_path_factory.mktemp("restarted")
    tree = small_run(folder, data, checkpoint={"every_tokens": 512, "keep_last": 10, "asynchronous": False})
    tree["evaluation"] = {"every_steps": 3, "sequences": 5, "data": [{"name": "v", "path": data["held_out"]}]}
    run_file = write_run(folder, tree)
    assert pretrain(1, run_file, "--dry-run").returncode == 0  # so that the server of the test's processes is up
    started = time.time()
    for fault in (Fault("kill", 4, rank=1), Fault("kill", 7)):
        assert pretrain_with([fault], 2, run_file).returncode
        time.sleep(1.0)  # in a queue
    assert pretrain_with([Fault("loss", 7)], 2, run_file).returncode == 0
    return folder / "run", ended(metrics(folder / "run")[-1]) - started


def test_a_run_with_two_restarts(restarted: tuple[Path, float]) -> None:
    run, took = restarted
    records = metrics(run)
    check_sums(records)
    assert records[-1]["run_seconds"] == pytest.approx(took, rel=0.01, abs=0.1)  # until the first process exists
    starts = [record["step"] for record in records if "start_seconds" in record]
    assert len(starts) == 3 and starts[0] == 1
    assert all(record["start_seconds"] > 1.0 for record in records if record["step"] in starts[1:])
    assert [record["step"] for record in records if "evaluation_seconds" in record] == [3, 6, 8]
    held = 3600 * records[-1]["rank_hours"] / 2  # two ranks
    between_starts = sum(record["wall_seconds"] - record.get("start_seconds", 0.0) for record in records)
    assert between_starts < held < records[-1]["run_seconds"] - 2.0  # in the queue


def test_the_report_says_where_the_time_went(restarted: tuple[Path, float]) -> None:
    run, _ = restarted
    said = dict(line.rsplit("  ", 1) for line in report(run).splitlines())
    said = {name.strip(): value.strip() for name, value in said.items()}
    assert said["goodput"] == f"{metrics(run)[-1]['goodput']:.2%}"
    parts = ("waits for data", "starts", "saves", "evaluation", "other", "skipped steps")
    shares = [float(said[name].rstrip("%")) for name in ("goodput", *parts)]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_a_rollback_counts_what_it_lost(tmp_path: Path, data: dict[str, str]) -> None:
    changes = {"checkpoint": {"every_tokens": 512, "keep_last": 10}, "guard": {"on_bad_step": "rollback"}}
    run_file = write_run(tmp_path, small_run(tmp_path, data, **changes))
    assert pretrain_with([Fault("loss", 6)], 1, run_file).returncode == 0
    records = metrics(tmp_path / "run")
    check_sums(records)
    assert [record["step"] for record in records if "start_seconds" in record] == [1, 6]
    assert 3600 * records[-1]["rank_hours"] == pytest.approx(records[-1]["run_seconds"], rel=0.02, abs=0.1)


def test_a_run_that_was_killed_before_its_first_checkpoint(tmp_path: Path, data: dict[str, str]) -> None:
    """It begins again from nothing, and its time does not."""
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    started = time.time()
    assert pretrain_with([Fault("kill", 4)], 1, run_file).returncode
    assert pretrain(1, run_file).returncode == 0
    records = metrics(tmp_path / "run")
    check_sums(records)
    assert records[-1]["run_seconds"] == pytest.approx(ended(records[-1]) - started, rel=0.01, abs=0.1)


@pytest.mark.parametrize(
    "values",
    [
        {"time": "2026-11-30T07:00:00Z"},
        {"time": "2026-11-30T07:00:00.000Z", "run_seconds": float("inf"), "goodput": 1},
        {"time": "2026-11-30T07:00:00.000Z", "run_seconds": 10**400, "goodput": 0.5},
        {"time": 5, "run_seconds": 1, "goodput": 0.5},
        {"time": "2026-11-30T07:00:00.000Z", "run_seconds": 1, "goodput": "much"},
    ],
)
def test_lines_without_times_and_junk_stop_no_run(values: dict[str, Any]) -> None:
    clock = WallTime.of([{"step": 1, **values}], 1)
    clock.end("start_seconds")
    clock.end("step_seconds")
    seconds = clock.new_line(0.0, useful=True)["run_seconds"]
    assert isinstance(seconds, float) and 0 < seconds < 10**5


def test_a_run_that_an_earlier_version_began() -> None:
    """Its lines have no times."""
    later = {"step": 2, "time": "2026-11-30T07:00:00.000000Z", "run_seconds": 3600.0, "goodput": 0.9}
    clock = WallTime.of([{"step": 1}, later], 2)
    clock.end("start_seconds")
    clock.end("step_seconds")
    line = clock.new_line(0.0, useful=True)
    assert float(line["run_seconds"]) >= 3600 and 0 < float(line["goodput"]) <= 1


def test_a_resume_where_the_clock_is_behind(tmp_path: Path, data: dict[str, str]) -> None:
    """The clock of the machine that wrote the last line was an hour ahead."""
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run_file, "debug.max_steps=4").returncode == 0
    records = metrics(tmp_path / "run")
    records[-1]["time"] = (datetime.now(timezone.utc) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = pretrain(1, run_file)
    assert result.returncode == 0, result.stderr
    after = metrics(tmp_path / "run")[4:]
    assert len(after) == 4 and all(record["step_seconds"] > 0 and 0 < record["goodput"] <= 1 for record in after)


def test_a_clock_that_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = WallTime.of([], 0)
    clock.end("start_seconds")
    an_hour_ago = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: an_hour_ago)
    assert clock.end("step_seconds") > 0


def test_a_line_that_was_lost() -> None:
    """The disk was full until a kill. What was useful before stays."""
    line = {"step": 1, "time": "2026-11-30T07:00:00.000000Z", "run_seconds": 1e7, "goodput": 0.9}
    clock = WallTime.of([line, line | {"step": 9, "run_seconds": 2e7}], 2)
    assert clock.useful == pytest.approx(9e6)


@pytest.mark.parametrize("evaluation", [{}, {"every_steps": 2, "sequences": 5}])
def test_lines_that_cannot_be_read(tmp_path: Path, data: dict[str, str], evaluation: dict[str, Any]) -> None:
    """The kernel refuses to read the first byte: an I/O error, which may pass."""
    if evaluation:
        evaluation["data"] = [{"name": "v", "path": data["held_out"]}]
    run_file = write_run(tmp_path, small_run(tmp_path, data, evaluation=evaluation))
    assert pretrain(2, run_file, "debug.max_steps=2").returncode == 0
    (tmp_path / "run/metrics.jsonl").unlink()
    (tmp_path / "run/metrics.jsonl").symlink_to("/proc/self/mem")
    ended = training(run_file).to_their_ends(2)
    said = f"error: cannot read {tmp_path}/run/metrics.jsonl: Input/output error\n"
    assert [one.returncode for one in ended] == [1, 1]
    assert all(one.stderr.endswith(said) and "Traceback" not in one.stderr for one in ended), ended
