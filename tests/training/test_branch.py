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
        (["model.num_layers=4"], "differs from the saved run in model.num_layers (saved 2, now 4)"),
        (["precision=bf16"], "differs from the saved run in precision (saved 'fp32', now 'bf16')"),
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


def test_all_that_is_refused_is_said_at_once(tmp_path: Path, data: dict) -> None:
    run = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run, "debug.max_steps=3").returncode == 0
    longer = "phases.0.tokens=2560"
    refused = pretrain(1, run, longer)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "permit it with checkpoint.may_change=[phases.0.tokens]" in refused.stderr
    assert "data.new_blend=true" in refused.stderr
    ended = pretrain(1, run, longer, "checkpoint.may_change=[phases.0.tokens]", "data.new_blend=true")
    assert ended.returncode == 0, ended.stderr
    assert len(metrics(tmp_path / "run")) == 10 + 3


def test_a_phase_more_is_shown_in_short(tmp_path: Path, data: dict) -> None:
    tree = small_run(tmp_path, data)
    assert pretrain(1, write_run(tmp_path, tree), "debug.max_steps=3").returncode == 0
    tree["phases"].append({**tree["phases"][1], "name": "more"})
    refused = pretrain(1, write_run(tmp_path, tree))
    assert "in phases (saved 2 of them, now 3). Set it back" in refused.stderr


def test_a_checkpoint_of_a_version_with_another_option(tmp_path: Path, data: dict) -> None:
    """What is gone is not missed, unless the losses depended on it."""
    from jetmoe_megatron.checkpoint.integrity import CHECKSUMS, checksum

    run = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run, "debug.max_steps=3").returncode == 0
    saved = tmp_path / "run/checkpoints/tokens_768/run.yaml"
    written = saved.read_text()
    for section, status in (("parallel", 0), ("losses", 2)):
        saved.write_text(written.replace(f"\n{section}:\n", f"\n{section}:\n  of_last_month: 3\n"))
        sums = json.loads((saved.parent / CHECKSUMS).read_text())
        (saved.parent / CHECKSUMS).write_text(json.dumps({**sums, "run.yaml": checksum(saved)}))
        ended = pretrain(1, run, "debug.max_steps=3")
        assert ended.returncode == status, ended.stderr
    assert "losses.of_last_month: unknown key" in ended.stderr


def test_retention(tmp_path: Path, data: dict) -> None:
    """Those at multiples of keep_every_tokens, that of each phase's end, and besides those the last one."""
    checkpoint = {"every_tokens": 256, "keep_last": 1, "keep_every_tokens": 768}
    assert pretrain(1, write_run(tmp_path, small_run(tmp_path, data, checkpoint=checkpoint))).returncode == 0
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {f"tokens_{n * 256}" for n in (3, 5, 6, 7, 8)}
    first, *others = metrics(tmp_path / "run")  # each has what the save after the step before took
    assert "save_stall_seconds" not in first and all("save_stall_seconds" in r for r in others)


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


def test_what_it_began_at_is_remembered(plateau: Path, tmp_path: Path, data: dict) -> None:
    from jetmoe_megatron.config import load_run

    source = plateau / "run"
    assert branch(tmp_path, data, source, "phase=2", "phases.0.tokens=2304", "debug.max_steps=9").returncode == 0
    again = branch(tmp_path, data, source, "phase=2", "phases.0.tokens=2304", "debug.max_steps=10")
    assert again.returncode == 0, again.stderr
    assert load_run(tmp_path / "run/config.yaml").start_from == str(source / "checkpoints/tokens_2048")


def test_the_newest_whole_checkpoint_is_taken_with_a_warning(plateau: Path, tmp_path: Path, data: dict) -> None:
    source = tmp_path / "source"
    shutil.copytree(plateau / "run/checkpoints", source / "checkpoints")
    (source / "checkpoints/tokens_2048/progress.json").write_text("{}")
    ended = branch(tmp_path, data, source, "debug.max_steps=8")
    assert ended.returncode == 0, ended.stderr
    assert [r["step"] for r in metrics(tmp_path / "run")] == [8]
    assert "tokens_2048 is damaged" in ended.stderr and "taking tokens_1792" in ended.stderr
    for checkpoint in (source / "checkpoints").iterdir():
        (checkpoint / "progress.json").write_text("{}")
    refused = branch(tmp_path / "other", data, source)
    assert refused.returncode == 2 and "no whole checkpoint is left" in refused.stderr
