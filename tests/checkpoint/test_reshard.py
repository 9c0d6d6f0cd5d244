"""A checkpoint of any layout loads in any other: weights and both Adam moments to the bit, and the next step's loss."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.oracle import assemble, pieces, train_step, training, weight_of
from tests.parallel.test_equal_to_one_process import run_tree
from tests.ranks import run_ranks

# name: (ranks, parallel section)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"distributed_optimizer": False}),
    "tp2 ep2 pp2": (4, {"tensor": 2, "expert": 2, "pipeline": 2}),
    "dp2": (2, {}),
    "dp2, no distributed optimizer": (2, {"distributed_optimizer": False}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pp2, layers 1 and 3, dp2": (4, {"pipeline": 2, "layers_per_stage": [1, 3]}),
    "tp2 etp2 ep2, all sharded": (
        4,
        {"tensor": 2, "expert_tensor": 2, "expert": 2, "attention_experts": "sharded"},
    ),
    "ep4, no distributed optimizer": (4, {"expert": 4, "distributed_optimizer": False}),
    "pp2 dp3": (6, {"pipeline": 2}),  # Megatron pads what three ranks cannot divide
}
KINDS = ("weight", "exp_avg", "exp_avg_sq")
State = dict[str, dict[str, Tensor]]


def trained(tree: dict[str, Any], folder: str) -> tuple[Any, list[float]]:
    """Two steps, a checkpoint, whose parts pass between the ranks in small blocks, one step more."""
    with training(tree, 3) as (run, model, batches_of_steps):
        from jetmoe_megatron.checkpoint import optimizer_state
        from jetmoe_megatron.checkpoint.saver import Saver
        from jetmoe_megatron.training.optimizer import build_optimizer

        optimizer_state._GATHERED_AT_ONCE = 1000
        optimizer = build_optimizer(run, model)
        first, second, third = batches_of_steps
        for batches in (first, second):
            step(model, optimizer, batches)
        saver = Saver(Path(folder), run, lambda tokens: False)
        saver.save({"tokens": 512, "data": {}}, model, optimizer, wait=True)
        assert saver.failed is None
        return state_pieces(model, optimizer), step(model, optimizer, third)


def loaded(tree: dict[str, Any], folders: list[str]) -> list[tuple[Any, list[float]]]:
    """Of each checkpoint: its state in this layout, and the loss of the step after it."""
    result = []
    with training(tree, 3) as (run, model, batches_of_steps):
        from jetmoe_megatron.checkpoint.load import load_checkpoint
        from jetmoe_megatron.training.optimizer import build_optimizer

        optimizer = build_optimizer(run, model)
        *_, third = batches_of_steps
        for folder in folders:
            load_checkpoint(Path(folder) / "tokens_512", model, optimizer)
            result.append((state_pieces(model, optimizer), step(model, optimizer, third)))
    return result


def step(model: Any, optimizer: Any, batches: Any) -> list[float]:
    """Loss and gradient norm."""
    reduced = train_step(model, optimizer, batches, learning_rate=1e-2)
    return [reduced["lm_loss"], reduced["grad_norm"]]


def state_pieces(model: Any, optimizer: Any) -> dict[str, Any]:
    from jetmoe_megatron.checkpoint.optimizer_state import steps_done

    state = whole_state(optimizer)

    def value_of(kind: str) -> Any:
        return weight_of if kind == "weight" else lambda p: state[p][kind]

    found: dict[str, Any] = {kind: pieces(model, value_of(kind)) for kind in KINDS}
    return {**found, "steps": steps_done(optimizer)}


def whole_state(optimizer: Any) -> Any:
    """Of each parameter of this rank, summed from where each data-parallel rank says that its part lies."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from jetmoe_megatron.checkpoint.optimizer_state import own_state

    state = own_state(optimizer)
    for part in optimizer.chained_optimizers:
        if not isinstance(part, DistributedOptimizer):
            continue
        for parameter in (p for buffer in part.buffers for p in buffer.params):
            for kind in state[parameter]:
                flat = torch.zeros(parameter.numel())
                if parameter in part.model_param_gbuf_map:
                    place = part._get_model_param_range_map(parameter)["param"]
                    own = part._get_main_param_and_optimizer_states(parameter)
                    flat[place.start : place.end] = own["param" if kind == "master" else kind].flatten()
                torch.distributed.all_reduce(flat, group=part.data_parallel_group)
                state[parameter][kind] = flat.view(parameter.shape)
    return state


def whole(ranks: list[dict[str, Any]]) -> State:
    assert {rank["steps"] for rank in ranks} == {2}
    return {kind: assemble([piece for rank in ranks for piece in rank[kind]]) for kind in KINDS}


def tree_of(layout: str, precision: str = "fp32") -> tuple[int, dict[str, Any]]:
    ranks, parallel = LAYOUTS[layout]
    return ranks, run_tree(parallel=parallel, precision=precision, batch__global_tokens=24 * 32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, whole state, loss of the next step) of a layout, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("saved"), {}

    def get(layout: str) -> tuple[str, State, list[float]]:
        if layout not in made:
            ranks, tree = tree_of(layout)
            folder = str(root / layout)
            results = run_ranks(ranks, trained, tree, folder)
            made[layout] = folder, whole([state for state, _ in results]), results[0][1]
        return made[layout]

    return get


@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_loads_all(target: str, saved: Any) -> None:
    compare(target, list(LAYOUTS), saved)


def compare(target: str, sources: list[str], saved: Any) -> None:
    ranks, tree = tree_of(target)
    truths = [saved(source) for source in sources]
    results = run_ranks(ranks, loaded, tree, [folder for folder, _, _ in truths])
    for number, (source, (_, state, next_step)) in enumerate(zip(sources, truths, strict=True)):
        here = whole([rank[number][0] for rank in results])
        for kind in KINDS:
            assert here[kind].keys() == state[kind].keys()
            for name, expected in state[kind].items():
                assert torch.equal(here[kind][name], expected), f"{source} -> {target}: {kind} of {name}"
        assert results[0][number][1] == pytest.approx(next_step, rel=1e-5), f"{source} -> {target}: next step"


def bf16_master(tree: dict[str, Any], folder: str, load: bool) -> dict[str, Any]:
    """Pieces of what the optimizer steps on, and of a moment."""
    with training(tree, 2) as (run, model, batches_of_steps):
        from jetmoe_megatron.checkpoint.load import load_checkpoint
        from jetmoe_megatron.checkpoint.saver import Saver
        from jetmoe_megatron.training.optimizer import build_optimizer

        optimizer = build_optimizer(run, model)
        if load:
            load_checkpoint(Path(folder) / "tokens_512", model, optimizer)
        else:
            for batches in batches_of_steps:
                step(model, optimizer, batches)
            Saver(Path(folder), run, lambda tokens: False).save(
                {"tokens": 512, "data": {}}, model, optimizer, wait=True
            )
        state = whole_state(optimizer)
        master = pieces(model, lambda p: state[p].get("master", p.detach()))
        return {"master": master, "exp_avg": pieces(model, lambda p: state[p]["exp_avg"])}


@pytest.mark.parametrize(
    ("source", "target"), list(itertools.permutations(["dp2", "ep4, no distributed optimizer"], 2))
)
def test_bf16_master_weights(source: str, target: str, tmp_path: Path) -> None:
    states = []
    for layout, load in ((source, False), (target, True)):
        ranks, tree = tree_of(layout, "bf16")
        found = run_ranks(ranks, bf16_master, tree, str(tmp_path), load)
        states.append({kind: assemble([p for rank in found for p in rank[kind]]) for kind in ("master", "exp_avg")})
    before, after = states
    for kind, truth in before.items():
        assert truth.keys() == after[kind].keys()
        assert all(torch.equal(truth[name], after[kind][name]) for name in truth), kind
