"""Whole runs in which something goes wrong on one rank, and how they end."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.checkpoint.folder import published
from tests.injected_faults import ELASTIC, TORCHRUN, Fault, pretrain_with, sequences_read
from tests.support import jetmoe, losses, metrics, pretrain, small_run, write_dataset, write_run

SKIPS = [Fault("loss", 2, rank=1), Fault("gradient", 4), Fault("expert", 6, rank=1)]
ROLLBACK = ("guard.on_bad_step=rollback",)


def run_of(folder: Path, data: dict[str, str], **changes: Any) -> Path:
    return write_run(folder, small_run(folder, data, **changes))


def bad_steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/bad_steps.jsonl").read_text().splitlines()]


def ledger(folder: Path) -> dict[str, Any]:
    return json.loads((published(folder / "run/checkpoints")[-1] / "progress.json").read_text())["data"]


def exactly(folder: Path) -> str:
    """The numbers of all steps to the last bit; as text, since NaN does not equal itself."""
    return repr(losses(folder / "run"))


@pytest.fixture(scope="module")
def skipped(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("skipped")
    result = pretrain_with(SKIPS, 2, run_of(folder, data))
    assert result.returncode == 0, result.stderr
    assert "warning: step 2: lm_loss is nan: step skipped" in result.stderr
    return folder


def test_skipped_steps_are_recorded_and_count(skipped: Path) -> None:
    records = metrics(skipped / "run")
    reasons = {2: "lm_loss is nan", 4: "grad_norm is nan", 6: "lm_loss is nan"}
    assert {r["step"]: r["skipped"] for r in records if "skipped" in r} == reasons
    assert [r["tokens"] for r in records] == [256 * step for step in range(1, 9)]
    assert records[6]["lr"] == pytest.approx(1e-2 * 0.1 ** (1 / 3))
    assert {r["step"]: r["reason"] for r in bad_steps(skipped)} == reasons
    second = bad_steps(skipped)[1]
    assert second["samples"] == [24, 32] and second["sequences"] == {"code": [18, 24], "prose": [6, 8]}
    assert ledger(skipped)["read"]["sample"] == 64


def test_an_interrupted_run_skips_alike(skipped: Path, tmp_path: Path, data: dict[str, str]) -> None:
    for steps in (4, 8):
        result = pretrain_with(SKIPS, 2, run_of(tmp_path, data), f"debug.max_steps={steps}")
        assert result.returncode == 0, result.stderr
    assert exactly(tmp_path) == exactly(skipped)
    progress = [json.loads((published(f / "run/checkpoints")[-1] / "progress.json").read_text())
                for f in (tmp_path, skipped)]  # fmt: skip
    assert progress[0] == progress[1] and progress[0]["guard"]["bad"] == [2, 4, 6]


def test_stop_ends_the_run_with_status_3_and_one_line(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = run_of(tmp_path, data, checkpoint__every_tokens=256)
    result = pretrain_with([Fault("loss", 3)], 2, run_file, "guard.on_bad_step=stop")
    assert result.returncode == 3
    assert result.stderr.splitlines() == [
        "error: step 3: lm_loss is nan: stopped, nothing saved; guard.on_bad_step=skip or rollback would continue"
    ]
    assert [p.name for p in published(tmp_path / "run/checkpoints")] == ["tokens_256", "tokens_512"]


def test_more_bad_steps_than_the_budget_end_the_run(tmp_path: Path, data: dict[str, str]) -> None:
    faults = [Fault("loss", step) for step in (3, 5, 6)]
    result = pretrain_with(faults, 1, run_of(tmp_path, data), "guard.budget=2")
    assert result.returncode == 3
    line = (
        "error: step 6: lm_loss is nan: 3 bad steps within 128 are more than guard.budget (2): stopped, nothing saved"
    )
    assert result.stderr.splitlines()[-1] == line


def test_a_spike_is_a_bad_step(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = run_of(tmp_path, data, phases__0__tokens=12 * 256, guard__window=8)
    result = pretrain_with([Fault("loss", 10, factor=40.0)], 1, run_file)
    assert result.returncode == 0, result.stderr
    skipped = {r["step"]: r["skipped"] for r in metrics(tmp_path / "run") if "skipped" in r}
    assert skipped.keys() == {10} and "is a spike" in skipped[10]


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """Twice to the same checkpoint: step 4 is bad with the data that was to be read, and with the data after that."""
    folder = tmp_path_factory.mktemp("rolled_back")
    run_file = run_of(folder, data, checkpoint__every_tokens=2 * 256)
    result = pretrain_with([Fault("loss", 4, rank=1, times=2)], 2, run_file, *ROLLBACK, reads=folder / "reads")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning: rolled back to 512 tokens") == 2
    return folder


def test_after_a_rollback_nothing_is_read_twice(rolled_back: Path) -> None:
    records = metrics(rolled_back / "run")
    assert [r["step"] for r in records] == list(range(1, 9)) and "skipped" not in str(records)
    assert [r["tokens"] for r in records] == [256 * step for step in range(1, 9)]
    assert [r["action"] for r in bad_steps(rolled_back)] == ["rollback"] * 2
    read = sequences_read(rolled_back / "reads")
    assert len(read) == len(set(read)) == (8 + 2 + 2) * 8


def test_the_ledger_knows_what_was_thrown_away(rolled_back: Path) -> None:
    saved = ledger(rolled_back)
    numbers = {name: {n for path, n in sequences_read(rolled_back / "reads") if Path(path).name == name}
               for name in ("code", "prose")}  # fmt: skip
    assert saved["read"]["sample"] == 64
    assert saved["read"]["sequences"] == {name: len(own) for name, own in numbers.items()}
    assert numbers == {name: set(range(len(own))) for name, own in numbers.items()}
    assert [(p["began"]["sample"], p["read"]["sample"], p["kept"]["sample"]) for p in saved["past"]] == [
        (0, 32, 16),
        (16, 32, 16),
    ]
    thrown = [sum(p["read"]["sequences"].values()) - sum(p["kept"]["sequences"].values()) for p in saved["past"]]
    assert thrown == [16, 16]


def test_a_run_that_dies_after_a_rollback_goes_on_alike(
    rolled_back: Path, tmp_path: Path, data: dict[str, str]
) -> None:
    run_file = run_of(tmp_path, data, checkpoint__every_tokens=2 * 256)
    faults = [Fault("loss", 4, rank=1), Fault("raise", 3, rank=1, first=2)]
    assert pretrain_with(faults, 2, run_file, *ROLLBACK).returncode == 1
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    assert pretrain_with([Fault("loss", 4, rank=1)], 2, run_file, *ROLLBACK).returncode == 0
    assert exactly(tmp_path) == exactly(rolled_back)
    assert ledger(tmp_path) == ledger(rolled_back)


def test_a_rollback_into_an_epoch_that_nobody_has_prepared(tmp_path: Path, data: dict[str, str]) -> None:
    code = write_dataset(tmp_path / "code", 24, seed=5)
    assert 42 <= count_sequences(code) < 42 + 16  # what the plan reads, and what it reads after the rollbacks
    run_file = run_of(tmp_path, {**data, "code": code}, checkpoint__every_tokens=2 * 256)
    prepared = jetmoe("data", "prepare", run_file)
    assert prepared.returncode == 0, prepared.stderr
    limited = ("data.build_limit_tokens=1", *ROLLBACK)
    result = pretrain_with([Fault("loss", 4, times=2)], 1, run_file, *limited)
    assert result.returncode == 0, result.stderr
    assert sum("epoch1" in path.name for path in (tmp_path / "run/data_index").iterdir()) == 1


def count_sequences(path: str) -> int:
    return (Path(f"{path}.bin").stat().st_size // 2 - 1) // 32


def test_a_rollback_before_the_first_checkpoint_goes_to_the_beginning(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = run_of(tmp_path, data)
    result = pretrain_with([Fault("loss", 2)], 1, run_file, *ROLLBACK, "debug.max_steps=3", reads=tmp_path / "reads")
    assert result.returncode == 0, result.stderr
    assert "rolled back to 0 tokens" in result.stderr
    read = sequences_read(tmp_path / "reads")
    assert len(read) == len(set(read)) == 5 * 8
    (tmp_path / "run/checkpoints/rollbacks.json").write_text("[")
    result = pretrain(1, run_file)
    assert result.returncode == 2 and "rollbacks.json: damaged" in result.stderr


@pytest.mark.parametrize(
    ("kind", "ranks", "launcher", "status", "said"),
    [
        ("kill", 2, ELASTIC, 137, "rank 1 on {host} was killed by SIGKILL"),
        ("raise", 2, ELASTIC, 1, "rank 1 on {host} exited with status 1"),
        pytest.param("kill", 4, ELASTIC, 137, "rank 1 on {host} was killed by SIGKILL", marks=pytest.mark.slow),
        ("kill", 2, TORCHRUN, 1, "error: rank 1 of 2 did not answer: "),
        pytest.param("hang", 2, ELASTIC, 4, "error: rank 1 of 2 did not answer: Timed out", marks=pytest.mark.slow),
        ("hang", 4, (), 4, "error: rank 1 of 4 did not answer: "),
        ("raise", 4, (), 1, "an error in the program"),
    ],
)
def test_a_rank_that_dies_is_named_and_the_others_end(
    kind: Any, ranks: int, launcher: tuple[str, ...], status: int, said: str, tmp_path: Path, data: dict[str, str]
) -> None:
    """Within the time limit of a command, in which the group's own (30 minutes) would not come."""
    split = {"tensor": 2, "pipeline": 2} if ranks == 4 else {}
    timeout = {"timeout_minutes": 0.25, "start_timeout_minutes": 0.25} if kind == "hang" else {}
    run_file = run_of(tmp_path, data, parallel={**split, **timeout})
    result = pretrain_with([Fault(kind, 3, rank=1)], ranks, run_file, launcher=launcher)
    assert result.returncode == status, result.stderr
    assert said.format(host=socket.gethostname()) in result.stderr
    assert len(metrics(tmp_path / "run")) == 2
