"""A run that begins at another one's checkpoint, and what a resumed run may change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support import losses, metrics, pretrain, small_run, write_run


@pytest.fixture(scope="module")
def plateau(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """A run that has done all its 8 steps, with every checkpoint kept: the phase switch is after step 5."""
    folder = tmp_path_factory.mktemp("plateau")
    tree = small_run(folder, data, checkpoint={"every_tokens": 256, "keep_last": 20})
    ended = pretrain(1, write_run(folder, tree))
    assert ended.returncode == 0, ended.stderr
    return folder


def branch(folder: Path, data: dict, source: Path, *overrides: str):  # noqa: ANN201
    run = write_run(folder, small_run(folder, data, start_from=str(source)))
    return pretrain(1, run, *overrides)


def test_a_decay_from_any_plateau_checkpoint(plateau: Path, tmp_path: Path, data: dict) -> None:
    before = {p: p.stat().st_mtime_ns for p in plateau.rglob("*")}
    source = plateau / "run" / "checkpoints" / "tokens_768"
    ended = branch(tmp_path, data, source, "phase=2")
    assert ended.returncode == 0, ended.stderr
    records = metrics(tmp_path / "run")
    assert [(r["step"], r["phase"]) for r in records] == [(4, "decay"), (5, "decay"), (6, "decay")]
    assert [r["lr"] for r in records] == pytest.approx([1e-2 * 0.1 ** (i / 3) for i in range(3)])
    assert records[0]["dataset_tokens/code"] == 3 * 192 + 128  # read on from where the plateau was
    assert {p: p.stat().st_mtime_ns for p in plateau.rglob("*")} == before
    progress = json.loads((tmp_path / "run" / "checkpoints" / "tokens_1536" / "progress.json").read_text())
    assert progress["branched_at"] == 768


def test_a_branch_resumes_as_if_it_had_not_stopped(plateau: Path, tmp_path: Path, data: dict) -> None:
    source = plateau / "run" / "checkpoints" / "tokens_768"
    assert branch(tmp_path / "a", data, source, "phase=2").returncode == 0
    assert branch(tmp_path / "b", data, source, "phase=2", "debug.max_steps=5").returncode == 0
    ended = branch(tmp_path / "b", data, source, "phase=2")
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "b" / "run") == losses(tmp_path / "a" / "run")


def test_the_switch_itself_is_a_branch(plateau: Path, tmp_path: Path, data: dict) -> None:
    """From the checkpoint at the end of phase 1 it is the same run."""
    ended = branch(tmp_path, data, plateau / "run" / "checkpoints" / "tokens_1280", "phase=2")
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "run") == losses(plateau / "run")[5:]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["phase=2", "start_from=no/such"], "start_from: no/such: no such folder"),
        (["phase=3"], "phase: 3 is not a phase after the first one of 2"),
        (["phase=1"], "phase: 1 is not a phase after the first one of 2"),
        (["phase=2", "start_from=null"], "phase: needs start_from"),
        (["phase=2", "batch.global_tokens=512"], "which is no multiple of batch.global_tokens (512)"),
        (["model.num_layers=4"], "was made with another model.num_layers (saved 2, now 4)"),
        (["precision=bf16"], "was made with another precision (saved 'fp32', now 'bf16')"),
        (["batch.sequence_length=64"], "was trained on sequences of 32, this run has 64"),
    ],
)
def test_what_cannot_be_branched(plateau: Path, tmp_path: Path, data: dict, overrides: list, said: str) -> None:
    ended = branch(tmp_path, data, plateau / "run" / "checkpoints" / "tokens_768", *overrides)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert said in ended.stderr
    assert not (tmp_path / "run").exists()


def test_what_a_resumed_run_may_change(tmp_path: Path, data: dict) -> None:
    run = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run, "debug.max_steps=3").returncode == 0
    other = ["optimizer.max_lr=0.02", "losses.balance=0.5"]
    refused = pretrain(1, run, *other)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "losses.balance (saved 0.01, now 0.5); optimizer.max_lr (saved 0.01, now 0.02)" in refused.stderr
    assert "checkpoint.may_change=[losses.balance,optimizer.max_lr]" in refused.stderr
    assert pretrain(1, run, *other, "checkpoint.may_change=[losses,optimizer.max_lr]").returncode == 0
    assert metrics(tmp_path / "run")[3]["lr"] == 0.02


def test_retention(tmp_path: Path, data: dict) -> None:
    """Those at multiples of keep_every_tokens, that of each phase's end, and besides those the last one."""
    checkpoint = {"every_tokens": 256, "keep_last": 1, "keep_every_tokens": 768}
    assert pretrain(1, write_run(tmp_path, small_run(tmp_path, data, checkpoint=checkpoint))).returncode == 0
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {f"tokens_{n * 256}" for n in (3, 5, 6, 7, 8)}
    assert all("save_stall_seconds" in r for r in metrics(tmp_path / "run"))


def test_another_batch_that_cannot_count_the_steps(plateau: Path, tmp_path: Path, data: dict) -> None:
    ended = branch(tmp_path, data, plateau / "run/checkpoints/tokens_1024", "batch.global_tokens=384")
    assert ended.returncode == 2
    assert "is at 1024 tokens, which is no multiple of batch.global_tokens (384)" in ended.stderr
    ended = branch(tmp_path, data, plateau / "run/checkpoints/tokens_1024", "batch.global_tokens=512")
    assert ended.returncode == 0, ended.stderr
    assert [(r["step"], r["tokens"]) for r in metrics(tmp_path / "run")] == [(3, 1536), (4, 2048), (5, 2560)]
    past = json.loads((tmp_path / "run/checkpoints/tokens_2560/progress.json").read_text())["data"]["past"]
    assert len(past) == 1  # a blend of its own: its phases are rounded up to other ends


def test_the_source_is_decided_once(plateau: Path, tmp_path: Path, data: dict) -> None:
    """The other run goes on, and saves, before this one has a checkpoint of its own."""
    from jetmoe_megatron.config import Run, dump_run
    from jetmoe_megatron.training.branch import branch as branched

    source, own = tmp_path / "source", tmp_path / "run"
    for tokens in (512, 768):
        shutil.copytree(plateau / f"run/checkpoints/tokens_{tokens}", source / f"aside/tokens_{tokens}")
    (source / "checkpoints").mkdir()
    (source / "aside/tokens_512").rename(source / "checkpoints/tokens_512")
    run = Run.model_validate(small_run(tmp_path, data, start_from=str(source), phase=2))
    first = branched(run)
    assert first.start_from == str(source / "checkpoints/tokens_512") and first.phases[0].tokens == 512
    own.mkdir()
    (own / "config.yaml").write_text(dump_run(first))  # as training begins
    (source / "aside/tokens_768").rename(source / "checkpoints/tokens_768")
    assert branched(run) == first
    assert branched(first) == first  # what a rollback sees
    for junk in ("", "start_from: 3", "[]", "start_from: [", f"start_from: {source}/checkpoints/gone"):
        (own / "config.yaml").write_text(junk)
        assert branched(run).start_from == str(source / "checkpoints/tokens_768")
