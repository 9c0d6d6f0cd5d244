"""`logging.report_every_steps`: pages of a run that trains, from a process beside it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jetmoe_megatron.report.history import History
from jetmoe_megatron.report.page import page
from jetmoe_megatron.report.while_training import Reports
from tests.report.run_folders import Page, metrics_line, write_lines
from tests.support import losses, metrics, pretrain, small_run, training, write_run


def folder_of(tmp_path: Path) -> Path:
    write_lines(tmp_path / "metrics.jsonl", [metrics_line(step) for step in range(1, 9)])
    return tmp_path


def wait_until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_page_every_so_many_steps(tmp_path: Path) -> None:
    file, reports = folder_of(tmp_path) / "report.html", Reports(3, tmp_path)
    for step in (1, 2, 4):
        reports.step_done(step)
    assert reports._process is None
    reports.step_done(6)
    first = reports._process
    reports.step_done(9)
    assert first is not None and reports._process is first, "one at a time"
    assert first.wait(60) == 0 and file.read_text() == page([History(tmp_path)])
    reports.step_done(12)
    assert reports._process is not first
    never = Reports(0, tmp_path)
    never.step_done(3)
    assert never._process is None
    reports.close()
    assert reports._process and reports._process.returncode is not None
    assert file.read_text() == page([History(tmp_path)])


def test_what_fails_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reports = Reports(1, tmp_path / "no\nrun")
    reports.step_done(1)
    assert reports._process and reports._process.wait(60) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/no\\nrun/report.html: not written: ")
    reports.step_done(2)
    reports._process.kill()
    reports._process.wait()
    reports.step_done(3)
    assert capfd.readouterr().err == f"warning: {tmp_path}/no\\nrun/report.html: not written: killed by signal 9\n"
    reports.close()


def test_no_process_can_be_started(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jetmoe_megatron.runtime import beside

    monkeypatch.setattr(beside, "_UNSTOPPED", [str(tmp_path / "nothing")])
    reports = Reports(1, folder_of(tmp_path))
    reports.step_done(1)
    reports.close()
    assert capfd.readouterr().err.startswith(f"warning: {tmp_path}/report.html: not written: [Errno 2] No such file")


def test_a_run_that_trains_has_a_page(tmp_path: Path, data: dict[str, str]) -> None:
    """It is followed by that of its end, also after a signal."""
    file = tmp_path / "run/report.html"
    tree = small_run(tmp_path, data, phases__0__tokens=256 * 2000, logging={"every_steps": 1, "report_every_steps": 5})
    with training(write_run(tmp_path, tree)).following(2) as run:
        run.wait_for("step")
        wait_until(file.exists)
        steps = Page(file.read_text()).data["axes"][0]["steps"]
        assert steps[0] == 1 and steps[-1] >= 5
        run.send_signal(signal.SIGTERM)
        status, _, errors = run.ended()
    assert status == 75 and "report.html" not in errors
    lines = metrics(tmp_path / "run")
    assert Page(file.read_text()).data["axes"][0]["steps"][-1] == lines[-1]["step"] > steps[-1]
    assert [path.name for path in (tmp_path / "run").glob("report*")] == ["report.html"]


def test_it_changes_no_loss(tmp_path: Path, data: dict[str, str]) -> None:
    found = []
    for every in (0, 1):
        run_file = write_run(tmp_path / str(every), small_run(tmp_path / str(every), data))
        assert pretrain(1, run_file, f"logging.report_every_steps={every}").returncode == 0
        found.append(losses(tmp_path / str(every) / "run"))
    assert found[0] == found[1]
