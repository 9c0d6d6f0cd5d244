from __future__ import annotations

import builtins
import errno
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

import jetmoe_megatron.monitor.monitor
from data_tools.units import duration
from jetmoe_megatron.config import Run
from jetmoe_megatron.monitor.jsonl import JsonLines, read_metrics
from jetmoe_megatron.monitor.monitor import Monitor, Record
from jetmoe_megatron.monitor.names import grouped
from jetmoe_megatron.monitor.tensorboard import TensorBoard
from jetmoe_megatron.monitor.terminal import Terminal
from jetmoe_megatron.monitor.wandb import WeightsAndBiases
from tests.support import REPO, environment, small_run, training, write_run

DATA = {"code": "data/code", "prose": "data/prose"}


def record(step: int, **more: float) -> Record:
    return {
        "step": step,
        "phase": "stable",
        "tokens": 100 * step,
        "lr": 1e-3,
        "lm_loss": 5.0 - step,
        "grad_norm": 1.25,
        "tokens_per_second": 1234.5,
        "step_seconds": 2.0,
        "dataset_tokens/code": 75 * step,
        "dataset_tokens/prose": 25 * step,
        **more,
    }


class Failing:
    """Fails at its first two calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.taken: list[Record] = []

    def write(self, record: Record) -> None:
        self.calls += 1
        if self.calls <= 2:
            raise OSError("no network\nmore")
        self.taken.append(record)

    def amend(self, step: int, values: Record) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again at the next record."""
    monkeypatch.setattr(jetmoe_megatron.monitor.monitor, "_FIRST_PAUSE", 0.0)
    monkeypatch.setattr(jetmoe_megatron.monitor.monitor, "_TIMES_AS_LONG", 0)


@pytest.mark.usefixtures("at_once")
def test_a_tracker_that_fails_twice_recovers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    failing = Failing()
    monitor = Monitor([lambda: failing, partial(JsonLines, tmp_path / "m.jsonl", 0)])
    for step in (1, 2, 3):
        monitor.log(record(step))
    monitor.close()
    assert failing.taken == [record(1), record(2), record(3)] == read_metrics(tmp_path / "m.jsonl")
    failed, again, works = capsys.readouterr().err.splitlines()
    assert failed == again == "warning: <lambda> failed and is tried again in 0 seconds: no network"
    assert works == "<lambda> works again: it has all records that waited"


def test_between_failures_a_tracker_is_left_alone(capsys: pytest.CaptureFixture) -> None:
    failing = Failing()
    monitor = Monitor([lambda: failing])
    for step in range(1, 5):
        monitor.log(record(step))
    assert failing.calls == 1 and "tried again in 10 seconds" in capsys.readouterr().err
    monitor.close()  # the last attempt fails too
    assert failing.calls == 2 and "did not take the last 4 records" in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
def test_a_tracker_that_never_works(capsys: pytest.CaptureFixture) -> None:
    """For longer than a pause could be doubled. What a server says does not reach the terminal raw."""

    def refused() -> Failing:
        raise OSError("\x1b[2Jdenied")

    monitor = Monitor([refused])
    for step in range(1, 1100):
        monitor.log(record(step))
    said = capsys.readouterr().err
    assert said.count("denied") == 1100 and "\x1b" not in said


@pytest.mark.usefixtures("at_once")
def test_a_tracker_that_cannot_be_built_is_built_later(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    later = tmp_path / "missing/m.jsonl"
    monitor = Monitor([partial(JsonLines, later, 0), partial(JsonLines, tmp_path / "m.jsonl", 0)])
    monitor.log(record(1))
    later.parent.mkdir()
    monitor.log(record(2))
    monitor.close()
    assert read_metrics(later) == read_metrics(tmp_path / "m.jsonl") == [record(1), record(2)]
    assert capsys.readouterr().err.startswith("warning: JsonLines failed and is tried again in 0 seconds: ")


@pytest.mark.usefixtures("at_once")
def test_a_file_that_cannot_be_written_for_a_while_has_all_lines_once(tmp_path: Path) -> None:
    """On a network file system, I/O errors come and go."""
    path = tmp_path / "m.jsonl"
    monitor = Monitor([partial(JsonLines, path, 0)])
    for step in range(1, 6):
        broken = patch.object(JsonLines, "_flush", side_effect=OSError(errno.EIO, "Input/output error"))
        with broken if step in (2, 3) else nullcontext():
            monitor.log(record(step))
    monitor.close()
    assert read_metrics(path) == [record(step) for step in range(1, 6)]


def test_resumed_metrics_have_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(record(s)) + "\n" for s in (1, 2, 3)) + '{"step": 4, "lm')
    writer = JsonLines(path, resume_after_step=2)
    writer.write(record(3))
    writer.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]


def test_lines_wait_for_a_disk_that_is_full(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    monitor = Monitor([partial(JsonLines, path, 0)])
    monitor.log(record(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in (10, 0):  # half a line fits, then nothing
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
            monitor.log(record(2 if room else 3))
            assert [r["step"] for r in read_metrics(path)] == [1] and path.read_bytes().endswith(b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err == f"warning: {path}: No space left on device: lines wait in memory\n"
    monitor.log(record(4))
    monitor.close()
    assert read_metrics(path) == [record(step) for step in (1, 2, 3, 4)]


def test_lines_wait_for_a_disk_that_was_full_at_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The lines of steps that come again are dropped without a copy of the file, and nothing is left beside it."""
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lm')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        monitor = Monitor([partial(JsonLines, path, 2)])
        monitor.log(record(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "lines wait in memory" in capsys.readouterr().err
    monitor.log(record(4))
    monitor.close()
    assert read_metrics(path) == [record(step) for step in (1, 2, 3, 4)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_waits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"

    def no_inodes(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", no_inodes)
        writer = JsonLines(path, 0)
        writer.write(record(1))
    writer.write(record(2))
    writer.close()
    assert read_metrics(path) == [record(1), record(2)]


def test_amended_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in (1, 2, 3)))
    monitor = Monitor([partial(JsonLines, path, 2)])
    monitor.amend(2, {"held_out_loss": 4.0})
    monitor.log(record(3))
    monitor.close()
    assert read_metrics(path) == [record(1), record(2, held_out_loss=4.0), record(3)]


def test_an_amendment_waits_for_a_disk_that_is_full(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in (1, 2)))
    monitor = Monitor([partial(JsonLines, path, 2)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        monitor.amend(2, {"held_out_loss": 4.0})
        monitor.log(record(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.count("lines wait in memory") == 1
    monitor.log(record(4))
    monitor.close()
    assert read_metrics(path) == [record(1), record(2, held_out_loss=4.0), record(3), record(4)]
    assert list(tmp_path.iterdir()) == [path]


def test_lines_that_are_lost_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    monitor = Monitor([partial(JsonLines, path, 0)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        for step in (1, 2):
            monitor.log(record(step))
        monitor.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "2 lines are lost" in capsys.readouterr().err


ROUTERS = {
    "moa_balance_loss": 1.021,
    "moe_balance_loss": 1.012,
    "moa_load_imbalance": 1.304,
    "moe_load_imbalance": 1.2,
}


def test_progress_line(capsys: pytest.CaptureFixture) -> None:
    terminal = Terminal(100, 10, Path("none"))
    for step in range(1, 12):
        terminal.write(record(step, held_out_loss=4.5) | ROUTERS)
    assert capsys.readouterr().out == (
        "step  10/100 | stable | 1,000 tokens | loss -5.0000 | held-out 4.5000 | balance 1.02/1.01"
        " | load 1.30/1.20 | grad norm 1.25 | lr 1.00e-03 | 1,234 tokens/s | 3m 00s left\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (250, "4m 10s"), (11_100, "3h 05m"), (1_123_200, "13d 00h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, writing to disk: every key of a record arrives."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = Run.model_validate(small_run(tmp_path, DATA, logging={"wandb": "offline"}))
    writer = WeightsAndBiases(run, 0)
    writer.write(record(1))
    loads = {"moa_load": [[1.0, 1.0]], "moe_load": [[0.5, 1.5], [2.0, 0.0]]}
    writer.write(record(2) | {"alarms": {"load/moe": "layer 3"}, "routers": {"step": 2, **loads}})
    writer.close()
    (file,) = tmp_path.glob("run/logs/wandb/offline-run-*/*.wandb")
    deadline = time.time() + 30  # wandb's own process may still be writing when finish() returns
    while not any(entry.HasField("exit") for entry in wandb_records(file)):
        assert time.time() < deadline
        time.sleep(0.1)
    history = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in entry.history.item}
        for entry in wandb_records(file)
        if entry.HasField("history")
    ]
    for step, entry in enumerate(history, start=1):
        sent = grouped(record(step))
        assert {key: entry[key] for key in sent} == sent
    assert len(history) == 2
    layer = "routers/moe/load/layer_1."  # a histogram by expert
    assert [history[1][layer + key] for key in ("_type", "values", "bins")] == ["histogram", [2.0, 0.0], [0, 1, 2]]
    assert len(history[1]) == len(history[0]) + 3 * 3
    (alert,) = [entry.alert for entry in wandb_records(file) if entry.HasField("alert")]
    assert (alert.title, alert.text) == ("load/moe at step 2", "layer 3")


KEY = "0123456789" * 4
KEYS: dict[str, tuple[dict[str, str], str, str]] = {  # environment, netrc, what is said
    "environment": ({"WANDB_API_KEY": KEY}, "", ""),
    "netrc": ({}, f"machine api.wandb.ai\n  login user\n  password {KEY}\n", ""),
    "none": ({}, "", "logging.wandb: online, but no key is found: run `wandb login`, set WANDB_API_KEY, or "),
    "of another machine": ({}, f"machine example.org\n  login user\n  password {KEY}\n", "online, but no key is found"),
    "malformed": ({"WANDB_API_KEY": "sesame"}, "", "logging.wandb: its key cannot be used: "),
    "no address": ({"WANDB_BASE_URL": "nowhere"}, "", "logging.wandb: its key cannot be used: "),
}


@pytest.mark.parametrize(("more", "netrc", "said"), KEYS.values(), ids=KEYS.keys())
def test_a_key_for_wandb(more: dict[str, str], netrc: str, said: str, tmp_path: Path) -> None:
    """In a process of its own: the package keeps what it has found. No network is reached."""
    if netrc:
        (tmp_path / ".netrc").write_text(netrc)
        (tmp_path / ".netrc").chmod(0o600)
    code = "from jetmoe_megatron.monitor.wandb import UserError, check_credentials\n"
    code += "try: check_credentials()\nexcept UserError as error: print(error)"
    env = {key: value for key, value in environment().items() if not key.startswith("WANDB_") and key != "NETRC"}
    env |= {"HOME": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9", **more}
    line = [sys.executable, "-c", code]
    ended = subprocess.run(line, cwd=REPO, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert said in ended.stdout and ended.stdout.count("\n") == bool(said) and ended.stderr == ""
    assert KEY not in ended.stdout and "sesame" not in ended.stdout


def wandb_records(file: Path) -> list:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes, each one a protobuf message."""
    from wandb.proto.wandb_internal_pb2 import Record as Message  # type: ignore[attr-defined]  # made when imported

    content, position, messages, pending = file.read_bytes(), 7, [], b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # no header fits in the rest of the block
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if position <= len(content) and kind in (1, 4):  # whole, or the last part
            messages.append(Message.FromString(pending))
            pending = b""
    return messages


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run.model_validate(small_run(tmp_path, DATA))
    for goes_on_after, steps in ((0, (1, 2, 3, 4)), (1, (2,))):  # killed, and resumed from an earlier checkpoint
        writer = TensorBoard(run, goes_on_after)
        for step in steps:
            writer.write(record(step))
        writer.close()
    events = EventAccumulator(str(tmp_path / "run/logs/tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/lm_loss")] == [(1, 4.0), (2, 3.0)]
    assert set(events.Tags()["scalars"]) == set(grouped(record(1))) - {"train/phase"}


@pytest.mark.parametrize("name", ["config.yaml.tmp", "metrics.jsonl.tmp"])
def test_nothing_is_written_through_what_lies_at_a_files_own_name_for_later(
    tmp_path: Path, data: dict[str, str], name: str
) -> None:
    """A link would lead the writing elsewhere, a pipe would be waited for."""
    run_file, run = write_run(tmp_path, small_run(tmp_path, data)), tmp_path / "run"
    assert training(run_file, "debug.max_steps=1").run().returncode == 0
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (run / name).symlink_to(victim)
    assert training(run_file, "debug.max_steps=2").run().returncode == 0
    with closing(JsonLines(run / "metrics.jsonl", 2)) as lines:
        lines.amend(2, {"held_out_loss": 1.0})
    assert victim.read_text() == "precious" and not (run / "config.yaml").is_symlink()
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert training(run_file, "debug.max_steps=3").run().returncode == 0
    with closing(JsonLines(run / "metrics.jsonl", 3)) as lines:
        lines.amend(3, {"held_out_loss": 1.0})
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]


def test_a_line_that_is_nested_too_deeply_is_junk(tmp_path: Path) -> None:
    """It could be read, and not written again when another line is amended."""
    deep = b'{"step": 1, "a": ' + b"[" * 900 + b"]" * 900 + b"}\n"
    (tmp_path / "m.jsonl").write_bytes(deep + b'{"step": 2}\n')
    lines = JsonLines(tmp_path / "m.jsonl", 2)
    lines.amend(2, {"held_out_loss": 1.0})
    lines.close()
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 2, "held_out_loss": 1.0}]
