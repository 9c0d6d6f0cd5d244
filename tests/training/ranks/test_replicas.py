"""What drifts on one rank is named: a weight, the tied embedding, a random state, experts in another order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import resolve_layout
from tests.ranks import run_ranks
from tests.support import small_run

Change = Callable[[Any], None]  # what happens to the model on rank 1


def drift(data: dict[str, str], parallel: dict[str, int], change: Change) -> str:
    """What the comparison says after `change` on rank 1."""
    import torch

    from jetmoe_megatron.training.ranks.process_groups import parallel_groups

    run = Run.model_validate(small_run(Path("unused"), data, parallel=parallel))
    layout = resolve_layout(run, 2)
    with parallel_groups(run, layout):
        from jetmoe_megatron.model.build import build_model
        from jetmoe_megatron.training.optimizer import wrap_for_data_parallel
        from jetmoe_megatron.training.ranks.replicas import check_ranks_agree

        model = wrap_for_data_parallel(run, build_model(run, layout))
        check_ranks_agree(model)
        if torch.distributed.get_rank() == 1:
            change(model[0].module)
        try:
            check_ranks_agree(model)
        except RuntimeError as error:
            return str(error)
        return "agreed"


def nothing(_model: Any) -> None:
    pass


def nudge(name: str, model: Any) -> None:
    import torch

    values = model.get_parameter(name).data.view(-1)
    values[0] = torch.nextafter(values[0], torch.tensor(9.0))


def swap_experts(name: str, model: Any) -> None:
    weight = model.get_parameter(name).data
    weight[[0, 1]] = weight[[1, 0]]


def nudge_tied_copy(model: Any) -> None:
    model.output_layer.weight.data[3, 5] += 1e-3


def draw_a_random_number(name: str, _model: Any) -> None:
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork(name):
        torch.rand(1)


ROUTER = "decoder.layers.1.self_attention.router.weight"
EXPERTS = "decoder.layers.1.mlp.experts.linear_in.weight"
EMBEDDING = "embedding.word_embeddings.weight"
RANDOM = "model-parallel-rng"


@pytest.mark.parametrize(
    ("parallel", "change", "where"),
    [
        pytest.param(
            {}, partial(nudge, EXPERTS), f"{EXPERTS} is not the same on all 2 data-parallel ranks", id="weight"
        ),
        pytest.param(
            {"tensor": 2}, partial(nudge, ROUTER), f"{ROUTER} is not the same on all 2 tensor-parallel ranks", id="tp"
        ),
        pytest.param(
            {},
            partial(swap_experts, EXPERTS),
            f"{EXPERTS} is not the same on all 2 data-parallel ranks",
            id="expert order",
        ),
        pytest.param(
            {},
            partial(draw_a_random_number, RANDOM),
            f"random state '{RANDOM}' is not the same on all 2 data-parallel ranks",
            id="random state",
        ),
        pytest.param({"expert": 2}, nothing, "agreed", id="expert parallelism, nothing"),
        pytest.param(
            {"pipeline": 2},
            nudge_tied_copy,
            f"{EMBEDDING} is not the same on all 2 embedding (first and last pipeline stage) ranks",
            id="tied embedding",
        ),
    ],
)
def test_drift_is_named_on_every_rank(data: dict, parallel: dict, change: Change, where: str) -> None:
    assert run_ranks(2, drift, data, parallel, change) == [where] * 2
