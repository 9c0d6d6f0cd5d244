"""`profile:` of real runs: the files of each rank that is named, what they say, and that nothing else changes."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile, record_function

from jetmoe_megatron.training import profile_table as parts
from jetmoe_megatron.training.profile_table import OF_MODEL, STEP, times_of
from tests.parallel.oracle import training
from tests.parallel.test_equal_to_one_process import run_tree
from tests.ranks import run_ranks
from tests.support import losses, pretrain, small_run, write_run

FOR_ALL = {*OF_MODEL, parts.ACCUMULATION, parts.REDUCTIONS, parts.OPTIMIZER, parts.REST}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "pipeline": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "recompute": "full"}),
    "experts, tensors": (2, {"parallel": {"expert": 2, "tensor": 2, "attention_experts": "replicated"}}),
    "sharded attention": (2, {"parallel": {"expert": 2, "attention_experts": "sharded", "overlap_grad_reduce": True}}),
}


def rows(run: Path, rank: int) -> dict[str, list[str]]:
    """The numbers of each line of the table."""
    lines = (run / f"logs/profile/rank_{rank}.txt").read_text().splitlines()[3:]
    return {line[:24].strip(): line[24:].split() for line in lines}


def trace(run: Path, rank: int) -> dict[str, Any]:
    return json.loads(gzip.decompress((run / f"logs/profile/rank_{rank}.trace.json.gz").read_bytes()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path, data: dict[str, str]) -> None:
    ranks, changes = LAYOUTS[layout]
    last = ranks - 1
    changes |= {"model__num_layers": 4, "logging__router_every_steps": 2}
    runs = []
    for name, section in (("off", {}), ("on", {"steps": [3, 4], "ranks": [last]})):
        tree = small_run(tmp_path / name, data, profile=section, **changes)
        ended = pretrain(ranks, write_run(tmp_path / name, tree), "debug.max_steps=5")
        assert ended.returncode == 0, ended.stderr
        runs.append(tmp_path / name / "run")
    off, on = runs
    assert losses(on) == losses(off)
    assert not (off / "logs/profile").exists()
    assert {file.name for file in (on / "logs/profile").iterdir()} == {
        f"rank_{last}.{k}" for k in ("txt", "trace.json.gz")
    }

    times, table = times_of(trace(on, last)), rows(on, last)
    assert times.steps == [3, 4]
    assert sum(times.of.values()) == pytest.approx(times.whole) and min(times.of.values()) > -1
    expected = FOR_ALL - {parts.EMBEDDING} | {parts.PIPELINE} if layout == "pipeline" else FOR_ALL
    assert {part for part, _ in times.of} == table.keys() - {"step"} == expected
    for part in expected & {*OF_MODEL}:
        assert min(times.of[part, backward] for backward in (False, True)) > 0, part
        assert float(table[part][2]) == pytest.approx(
            sum(times.of[part, way] for way in (False, True)) / 2000, abs=1e-3
        )
    assert sum(float(numbers[-2]) for name, numbers in table.items() if name != "step") == pytest.approx(
        float(table["step"][0]), abs=0.02
    )


def test_every_call_of_a_part_is_in_the_trace(tmp_path: Path, data: dict[str, str]) -> None:
    """2 steps of 4 micro-batches through 2 layers."""
    run_file = write_run(tmp_path, small_run(tmp_path, data, profile={"steps": [1, 2]}))
    assert pretrain(1, run_file, "debug.max_steps=3").returncode == 0
    names = [event["name"] for event in trace(tmp_path / "run", 0)["traceEvents"] if event.get("ph") == "X"]
    micro_batches = 2 * 4
    for part, calls in {
        parts.EMBEDDING: 1,
        parts.NORMS: 5,
        parts.MOA: 2,
        parts.MOA_ROUTER: 2,
        parts.MOA_EXPERTS: 4,
        parts.MOA_DISPATCH: 10,
        parts.MOE_ROUTER: 2,
        parts.MOE_EXPERTS: 2,
        parts.MOE_DISPATCH: 12,
        parts.RESIDUALS: 2,
        parts.OUTPUT: 3,
    }.items():
        assert names.count(part) == calls * micro_batches, part
    assert [name for name in names if name.startswith(STEP)] == [f"{STEP}1", f"{STEP}2"]
    assert names.count(parts.OPTIMIZER) == 2 * 4


def test_other_steps_when_it_resumes(tmp_path: Path, data: dict[str, str]) -> None:
    """A window that is over leaves the files, a window that has begun records its rest, and the files are replaced."""
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    steps = []
    for last, window in ((3, "[1,2]"), (5, "[2,3]"), (8, "[4,7]")):
        ended = pretrain(1, run_file, f"debug.max_steps={last}", f"profile.steps={window}")
        assert ended.returncode == 0, ended.stderr
        steps.append(times_of(trace(tmp_path / "run", 0)).steps)
    assert steps == [[1, 2], [1, 2], [6, 7]]
    assert (tmp_path / "run/logs/profile/rank_0.txt").read_text().startswith("rank 0, mean of steps 6 to 7, time of")


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_training_ends_within_the_window(tmp_path: Path, data: dict[str, str], action: str) -> None:
    changes = {"guard": {"on_bad_step": action, "budget": 0}, "optimizer__max_lr": 1e30, "schedule__warmup_tokens": 0}
    run_file = write_run(tmp_path, small_run(tmp_path, data, profile={"steps": [1, 8]}, **changes))
    ended = pretrain(1, run_file)
    assert ended.returncode == 3, ended.stderr
    assert "warning: profile: rank 0 has not come to step 8: nothing is written" in ended.stdout
    assert not (tmp_path / "run/logs/profile").exists()


def test_a_folder_that_cannot_be_made_ends_no_run(tmp_path: Path, data: dict[str, str]) -> None:
    (tmp_path / "run/logs").mkdir(parents=True)
    (tmp_path / "run/logs/profile").write_text("")
    ended = pretrain(1, write_run(tmp_path, small_run(tmp_path, data, profile={"steps": [1, 1]})))
    assert ended.returncode == 0, ended.stderr
    assert f"warning: profile: {tmp_path / 'run/logs/profile'}: not written: " in ended.stdout


def installed(tree: dict[str, Any], overlap: bool) -> tuple[list[bool], set[tuple[str, bool]]]:
    """Whether model, optimizer and functions are as before, within the ranges and after them; what a step then has."""
    with training(tree, 1) as (run, model, (batches,)):
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        from jetmoe_megatron.model import attention
        from jetmoe_megatron.training import metrics, profiler, step
        from jetmoe_megatron.training.optimizer import build_optimizer

        model[0].config.overlap_moe_expert_parallel_comm = overlap
        optimizer = build_optimizer(run, model)
        watched = [module for chunk in model for module in chunk.modules()]
        dispatchers = [module.token_dispatcher for module in watched if hasattr(module, "token_dispatcher")]

        def now() -> list[tuple[Any, ...]]:
            hooks = [(*module._forward_hooks.values(), *module._forward_pre_hooks.values()) for module in watched]
            owners = [attention, metrics, step, P2PCommunicator, optimizer, model[0].config]
            owners += [*dispatchers, *watched]
            return [*hooks, *(tuple(v for v in vars(owner).values() if callable(v)) for owner in owners)]

        before = now()
        with profiler._ranges(model, optimizer), profile(activities=[ProfilerActivity.CPU]) as recorded:
            same = [now() == before]
            with record_function(f"{STEP}1"):
                step.compute_gradients(model, optimizer, batches)
        same.append(now() == before)
        with tempfile.TemporaryDirectory() as folder:
            recorded.export_chrome_trace(f"{folder}/trace.json")
            times = times_of(json.loads(Path(folder, "trace.json").read_bytes()))
        return same, {place for place, micros in times.of.items() if micros > 0}


@pytest.mark.parametrize("overlap", [False, True], ids=["no overlap", "overlap of the experts' exchange"])
def test_nothing_stays(overlap: bool) -> None:
    for same, found in run_ranks(2, installed, run_tree(parallel={"expert": 2}), overlap):
        assert same == [False, True]
        missing = {part for part in OF_MODEL for way in (False, True) if (part, way) not in found}
        assert missing == ({parts.RESIDUALS} if overlap else set())  # no layer is called as a whole
