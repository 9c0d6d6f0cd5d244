"""Do all members of each process group make the same calls in the same order, from the start of a run to its end?

A difference shows on GPUs as a hang, or as numbers of one exchange that end in another.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from tests.injected_faults import Fault, install
from tests.parallel.collectives import Event, first_difference
from tests.parallel.recorder import Transport, gloo, record, store_of_ranks, traces
from tests.parallel.stand_in import StandIn
from tests.ranks import run_ranks
from tests.support import metrics, small_run, training, write_run

CPU = torch.device("cpu")
TOKENS = 24 * 32  # of a step
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SHARDED = {"attention_experts": "sharded"}
GLOBAL = {"losses": {"balance": 0.1, "z": 0.01, "scope": "global_batch"}}
BF16 = {"precision": "bf16"}
# (ranks, sequences of a micro-batch, parallel section, further changes). Each begins a run, and the next one with the
# same precision continues it.
Layout = tuple[int, int, dict[str, Any], dict[str, Any]]
LAYOUTS: dict[str, Layout] = {
    "dp2": (2, 6, {}, {}),
    "tp2": (2, 12, {"tensor": 2}, {}),
    "dp3, no distributed optimizer": (3, 4, {"distributed_optimizer": False}, GLOBAL),
    "pp2, layers 1 and 3": (2, 6, {"pipeline": 2, "layers_per_stage": [1, 3]}, {}),
    "pp2 vpp2 dp2, overlap": (4, 6, {"pipeline": 2, "virtual_pipeline": 2, **OVERLAP}, BF16),
    "tp2 etp2 dp2, overlap": (4, 6, {"tensor": 2, "expert_tensor": 2, **OVERLAP}, BF16),
    "pp2 vpp2, a group of 3": (2, 8, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "ep4, no distributed optimizer": (4, 3, {"expert": 4, "distributed_optimizer": False}, BF16),
    "ep2 dp2, attention experts sharded, overlap": (4, 6, {"expert": 2, **SHARDED, **OVERLAP}, {}),
    "tp2 etp2 ep2, attention experts sharded": (
        4,
        6,
        {"tensor": 2, "expert_tensor": 2, "expert": 2, **SHARDED},
        GLOBAL,
    ),
    "tp2 ep4, recompute full": (4, 6, {"tensor": 2, "expert": 4}, {"recompute": "full"}),
    "pp3, layers 1, 2 and 1, dp2": (6, 6, {"pipeline": 3, "layers_per_stage": [1, 2, 1]}, GLOBAL),
    "ep2 pp2 vpp2, overlap of exchange": (
        4,
        6,
        {"expert": 2, "pipeline": 2, "virtual_pipeline": 2, "overlap_moe_expert_parallel_comm": True},
        BF16,
    ),
    "tp2 ep2 pp2 vpp2 dp2, overlap": (
        8,
        6,
        {"tensor": 2, "expert": 2, "pipeline": 2, "virtual_pipeline": 2, **OVERLAP},
        BF16,
    ),
    "tp2 etp2 ep3 pp2, overlap, global batch": (
        12,
        4,
        {"tensor": 2, "expert_tensor": 2, "expert": 3, "pipeline": 2, **SHARDED, **OVERLAP},
        {**BF16, **GLOBAL},
    ),
    "tp2 ep4 pp3 dp4, overlap": (
        24,
        3,
        {"tensor": 2, "expert": 4, "pipeline": 3, "layers_per_stage": [1, 2, 1], **OVERLAP},
        {},
    ),
}


def next_layout(name: str) -> str:
    alike = [other for other, layout in LAYOUTS.items() if BF16.items() <= layout[3].items()]
    alike = alike if name in alike else [other for other in LAYOUTS if other not in alike]
    return alike[(alike.index(name) + 1) % len(alike)]


def tree_of(folder: Path, data: dict[str, str], layout: Layout, **changes: Any) -> dict[str, Any]:
    """Two steps, a switch of the phase and three steps. A checkpoint and a held-out loss come every second step."""
    _, sequences, parallel, further = layout
    base: dict[str, Any] = {
        "model__num_layers": 4,
        "model__num_experts": 12,
        "batch": {"sequence_length": 32, "global_tokens": TOKENS, "micro_sequences": sequences},
        "schedule__warmup_tokens": 0,
        "phases__0__tokens": 2 * TOKENS,
        "phases__1__tokens": 3 * TOKENS,
        "checkpoint": {"every_tokens": 2 * TOKENS, "may_change": ["losses"]},
        "evaluation": {"every_steps": 2, "sequences": 9, "data": [{"name": "v", "path": data["held_out"]}]},
        "debug": {"check_sync": 1},
    }
    return small_run(folder, data, **{**base, "parallel": parallel, **further, **changes})


def traced(
    folder: Path, ranks: int, tree: dict[str, Any], also: Callable[[], None], transport: Transport = StandIn
) -> tuple[int, str, dict[int, list[Event]]]:
    """Exit status, what went to stderr, and what each rank did. also: called in each rank."""
    with store_of_ranks() as port:
        before = partial(record, folder / "traces", port, transport, also)
        ended = training(write_run(folder, tree), before=before).run(ranks)
    return ended.returncode, ended.stderr, traces(folder / "traces")


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_members_of_a_group_do_the_same(name: str, tmp_path: Path, data: dict[str, str]) -> None:
    """A run with a step that is skipped, then its continuation in another layout with a rollback, to the end."""
    layout, other = LAYOUTS[name], LAYOUTS[next_layout(name)]
    first = tree_of(tmp_path, data, layout, debug__max_steps=3)
    check(tmp_path / "first", layout[0], first, at_step=1)
    assert [("skipped" in line, "held_out_loss" in line) for line in metrics(tmp_path / "run")] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    rest = tree_of(tmp_path, data, other, guard__on_bad_step="rollback")
    error = check(tmp_path / "rest", other[0], rest, at_step=5)
    assert f"rolled back to {4 * TOKENS:,} tokens" in error
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def check(folder: Path, ranks: int, tree: dict[str, Any], at_step: int) -> str:
    """With a loss that is NaN in one step, on all ranks as if they had exchanged it. Returns what went to stderr."""
    faults = [Fault("loss", at_step, rank) for rank in range(ranks)]
    status, error, found = traced(folder, ranks, tree, partial(install, faults))
    difference = first_difference(found)
    assert difference is None, f"{difference}\n{error}"
    assert status == 0, error
    assert len(found) == ranks and all(found.values())
    return error


MIXED: Layout = (4, 6, {"tensor": 2, "pipeline": 2, "expert": 2}, {})


@pytest.mark.parametrize(
    ("inside", "call", "place"),
    [
        pytest.param("_tokens_of_a_micro_batch", 2, "training/step.py, _tokens_of_a_micro_batch", id="step"),
        pytest.param("reduce_metrics", 2, "training/metrics.py, _sum_over_ranks", id="metrics of a step"),
        pytest.param("_bytes", 1, "checkpoint/saver.py, _bytes", id="save"),
        pytest.param("reduce_loss", 1, "training/metrics.py, _sum_over_ranks", id="evaluation"),
    ],
)
def test_a_call_that_one_rank_leaves_out_is_found(
    inside: str, call: int, place: str, tmp_path: Path, data: dict[str, str]
) -> None:
    tree = tree_of(tmp_path, data, (3, 8, {}, {}), debug__max_steps=3)
    _, _, found = traced(tmp_path, 3, tree, partial(leave_out, 1, inside, call))
    where, *does = (first_difference(found) or "none").splitlines()
    assert "of ranks [0, 1, 2], collective" in where
    others, own = sorted(does, key=lambda line: "rank 1" in line)
    assert others.startswith("  ranks 0, 2: all_reduce SUM of") and others.endswith(f"({place})")
    assert own.startswith("  rank 1: ")


def leave_out(rank: int, inside: str, call: int) -> None:
    """From now on: on `rank`, one all_reduce is not made, that which comes as number `call` within a function."""
    original, made = torch.distributed.all_reduce, 0

    def all_reduce(*arguments: Any, **named: Any) -> Any:
        nonlocal made
        frame: Any = sys._getframe()
        while frame and frame.f_code.co_name != inside:
            frame = frame.f_back
        made += frame is not None
        skipped = frame and made == call and int(os.environ["RANK"]) == rank
        return None if skipped else original(*arguments, **named)

    torch.distributed.all_reduce = all_reduce


def test_the_record_is_that_of_real_ranks(tmp_path: Path, data: dict[str, str]) -> None:
    """Over gloo the program makes the same calls in the same order, and gloo itself counts as many without a recorder.

    A save that runs beside the training asks whether it is done as often as it takes; here it does not.
    """
    trees = {
        name: tree_of(tmp_path / name, data, MIXED, debug__max_steps=3, checkpoint__asynchronous=False)
        for name in "012"  # as long as each other: paths are sent
    }
    alone, together = (
        traced(tmp_path / name, 4, trees[name], partial(install, []), transport)
        for name, transport in (("0", StandIn), ("1", gloo))
    )
    for status, error, found in (alone, together):
        assert first_difference(found) is None and status == 0, error
    for rank, events in alone[2].items():
        assert [event[:5] for event in events] == [event[:5] for event in together[2][rank]]

    run_file = write_run(tmp_path / "2", trees["2"])
    ended = training(run_file, before=partial(count, tmp_path)).run(4)
    assert ended.returncode == 0, ended.stderr
    for rank, events in alone[2].items():
        assert Counter(event.group for event in events) == json.loads((tmp_path / f"{rank}.json").read_text())


def count(folder: Path) -> None:
    """At the end, write how many calls gloo has counted on each group of several ranks that was used."""
    end = torch.distributed.destroy_process_group

    @wraps(end)
    def destroy_process_group() -> None:
        groups: list[Any] = [group for group in distributed_c10d._world.pg_map if group.size() > 1]
        calls = {f"{g.group_desc} {g.group_name}": g._get_backend(CPU)._get_sequence_number_for_group() for g in groups}
        used = {name: number for name, number in calls.items() if number}
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(used))
        end()

    torch.distributed.destroy_process_group = destroy_process_group  # type: ignore[assignment]


def test_what_is_exchanged_is_what_gloo_exchanges(tmp_path: Path) -> None:
    """Each kind of call, among the whole world, where a `StandIn` has the results of all ranks."""
    results = []
    for transport in (StandIn, gloo):
        with store_of_ranks() as port:
            folder = tmp_path / transport.__name__
            results.append(run_ranks(3, each_call, folder, port, transport))
        assert first_difference(traces(folder)) is None
    assert results[0] == results[1]


def each_call(folder: Path, port: int, transport: Transport) -> list[Any]:
    """What this one of three ranks has after each call."""
    record(folder, port, transport, lambda: None)
    torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=1))
    d, rank = torch.distributed, torch.distributed.get_rank()
    splits = [[1, 2, 3], [2, 2, 2], [3, 2, 1]][rank]

    def to_next(own: Tensor, other: Tensor) -> None:
        for work in d.batch_isend_irecv(
            [d.P2POp(d.isend, own, (rank + 1) % 3), d.P2POp(d.irecv, other, (rank - 1) % 3)]
        ):
            work.wait()

    calls: list[Callable[[Tensor, list[Tensor]], Any]] = [
        lambda own, parts: d.all_reduce(own),
        lambda own, parts: d.all_reduce(own, d.ReduceOp.MAX, async_op=True).wait(),
        lambda own, parts: d.broadcast(own, 1),
        lambda own, parts: d.all_gather(parts, own[:2]),
        lambda own, parts: d.all_gather_into_tensor(own, own[:2].clone()),
        lambda own, parts: d.reduce_scatter_tensor(parts[0], own),
        lambda own, parts: d.all_to_all_single(own, own.clone(), splits, splits),
        lambda own, parts: d.gather(own[:2].clone(), parts if rank == 1 else None, 1),
        lambda own, parts: d.scatter(parts[0], list(own.split(2)) if rank == 2 else None, 2),
        lambda own, parts: to_next(own[:2].clone(), parts[0]),
        lambda own, parts: d.barrier(),
    ]
    found: list[Any] = []
    for call in calls:
        own, parts = torch.arange(6) + 10**rank, [torch.zeros(2, dtype=torch.int64) for _ in range(3)]
        call(own, parts)
        found.append((own.tolist(), [part.tolist() for part in parts]))
    gathered, sent = [None] * 3, ["from", rank]
    d.all_gather_object(gathered, {"rank": rank})
    d.broadcast_object_list(sent, src=2)
    d.destroy_process_group()
    return [*found, gathered, sent]


def call(kind: str, what: str = "2 x float32", **more: Any) -> Event:
    return Event("g", (0, 1), kind, what, "here", **more)


def split(sent: tuple[int, int], received: tuple[int, int]) -> Event:
    return call("all_to_all", "float32", sent=sent, received=received)


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ([call("barrier")], [call("barrier")], None),
        ([call("barrier"), call("broadcast")], [call("broadcast"), call("barrier")], "ranks [0, 1], collective 1:"),
        ([call("barrier")] * 2, [call("barrier")], "ranks [0, 1], collective 2:"),
        ([call("barrier", "2 x float32")], [call("barrier", "2 x bfloat16")], "ranks [0, 1], collective 1:"),
        ([split((1, 2), (1, 5))], [split((5, 3), (2, 3))], None),
        ([split((1, 2), (1, 5))], [split((4, 3), (2, 3))], "to each [4, 3], from each [2, 3]"),
        ([call("send", peer=1)], [call("recv", peer=0)], None),
        ([call("send", peer=1), call("barrier")], [call("barrier"), call("recv", peer=0)], None),
        ([call("send", peer=1)], [call("send", peer=0)], "message from rank 0 to rank 1 1:"),
        ([call("send", peer=1)], [], "message from rank 0 to rank 1 1:"),
        ([call("send", "3 x float32", peer=1)], [call("recv", peer=0)], "message from rank 0 to rank 1 1:"),
    ],
)
def test_what_is_a_difference(one: list[Event], other: list[Event], found: str | None) -> None:
    difference = first_difference({0: one, 1: other})
    assert difference is None if found is None else found in str(difference)
