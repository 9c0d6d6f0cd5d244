"""Before anything is built, all groups that training uses have exchanged something, and who does not come is named."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.support import small_run

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp2, plain optimizer": (2, {"distributed_optimizer": False}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}),
    "pp2 vpp1 dp2": (4, {"pipeline": 2}),
    "ep2 tp2, sharded": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2, "attention_experts": "sharded"}),
    "pp2, plain optimizer": (2, {"pipeline": 2, "distributed_optimizer": False}),
    "tp2 pp2 ep2": (8, {"tensor": 2, "pipeline": 2, "expert": 2}),
}


def groups_used(folder: Path, data: dict[str, str], parallel: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Of more than one rank, from torch's flight recorder: in the warm-up, and in training after it."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = "20000"
    import torch

    from jetmoe_megatron.config import Run
    from jetmoe_megatron.config.layout import resolve_layout
    from jetmoe_megatron.training.loop import train
    from jetmoe_megatron.training.ranks import process_groups

    def recorded() -> list[str]:
        recorder: Any = torch._C._distributed_c10d
        entries = json.loads(recorder._dump_fr_trace_json()).get("entries", [])
        return [entry["process_group"][1] for entry in entries if entry["process_group"][1] in several]

    tree = small_run(folder, data, parallel=parallel, debug__max_steps=2, debug__check_sync=1)
    run = Run.model_validate(tree)
    layout = resolve_layout(run, int(os.environ["WORLD_SIZE"]))
    with process_groups.parallel_groups(run, layout):
        groups = torch.distributed.distributed_c10d._world.pg_map
        several = {group.group_desc for group in groups if group.size() > 1}
        before = recorded()
        assert train(run, layout) == 0
        return set(before), set(recorded()[len(before) :])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_groups_that_training_uses_are_warm(name: str, tmp_path: Path, data: dict[str, str]) -> None:
    ranks, parallel = LAYOUTS[name]
    for warm, used in run_ranks(ranks, groups_used, tmp_path, data, parallel):
        assert used <= warm, f"not warm: {used - warm}"
        # The recorder has no transfers. The last one is the norm's of experts that are not on all ranks.
        rare = {"PIPELINE_MODEL_PARALLEL_GROUP", "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP"}
        assert warm - used <= rare, f"never used: {warm - used}"


def warming_up(how: str, data: dict[str, str]) -> str:
    """Rank 1 does not come to the tensor group, or ends before it."""
    from jetmoe_megatron.config import Run
    from jetmoe_megatron.config.layout import resolve_layout
    from jetmoe_megatron.training.ranks import process_groups, warm_up

    parallel = {"tensor": 2, "pipeline": 2, "timeout_minutes": 0.1}
    run = Run.model_validate(small_run(Path("x"), data, parallel=parallel))
    if os.environ["RANK"] == "1":
        if how == "sleeps":
            warm_up._exchanges = lambda *a: time.sleep(3600)  # type: ignore[assignment]
        else:
            warm_up._sum = lambda group: os._exit(0)
    with process_groups.parallel_groups(run, resolve_layout(run, 4)):
        return "warm"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("sleeps", "error: warming up the groups took longer than 0.1 minutes: rank 1 of 4 did not come"),
        ("ends", "error: rank 1 of 4 did not answer: "),  # gloo notices it
    ],
)
def test_a_rank_that_does_not_take_part_is_named(how: str, said: str, data: dict[str, str], capfd: Any) -> None:
    began = time.monotonic()
    with pytest.raises((RuntimeError, TimeoutError)):
        run_ranks(4, warming_up, how, data, timeout=60)
    assert time.monotonic() - began < 50
    assert said in capfd.readouterr().err
