"""A weight that drifts on one rank is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import resolve_layout
from tests.ranks import run_ranks
from tests.support import small_run


def drift(data: dict[str, str], tensor: int, name: str) -> str:
    """Change one value of one weight on rank 1 and compare."""
    import torch

    from jetmoe_megatron.training.parallel import parallel_state

    run = Run.model_validate(small_run(Path("unused"), data, parallel={"tensor": tensor}))
    layout = resolve_layout(run, 2)
    with parallel_state(run, layout):
        from jetmoe_megatron.model.build import build_model
        from jetmoe_megatron.training.optimizer import wrap_for_data_parallel
        from jetmoe_megatron.training.sync import check_ranks_agree

        model = wrap_for_data_parallel(run, build_model(run, layout))
        check_ranks_agree(model)
        if torch.distributed.get_rank() == 1:
            weight = dict(model[0].module.named_parameters())[name]
            weight.data.view(-1)[0] = torch.nextafter(weight.data.view(-1)[0], torch.tensor(9.0))
        try:
            check_ranks_agree(model)
        except RuntimeError as error:
            return str(error)
        return "agreed"


def drift_of_tied_embedding(data: dict[str, str]) -> str:
    """Change the last pipeline stage's copy of the embedding."""
    from jetmoe_megatron.training.parallel import parallel_state

    run = Run.model_validate(small_run(Path("unused"), data, parallel={"pipeline": 2}))
    layout = resolve_layout(run, 2)
    with parallel_state(run, layout):
        import torch

        from jetmoe_megatron.model.build import build_model
        from jetmoe_megatron.training.optimizer import wrap_for_data_parallel
        from jetmoe_megatron.training.sync import check_ranks_agree

        model = wrap_for_data_parallel(run, build_model(run, layout))
        check_ranks_agree(model)
        if torch.distributed.get_rank() == 1:
            model[0].module.output_layer.weight.data[3, 5] += 1e-3
        try:
            check_ranks_agree(model)
        except RuntimeError as error:
            return str(error)
        return "agreed"


def test_drift_of_the_tied_embedding_is_named(data: dict) -> None:
    (message, _) = run_ranks(2, drift_of_tied_embedding, data)
    assert message == (
        "embedding.word_embeddings.weight is not the same on all 2 embedding (first and last pipeline stage) ranks"
    )


@pytest.mark.parametrize(
    ("tensor", "name", "where"),
    [
        (1, "decoder.layers.1.mlp.experts.linear_in.weight", "2 data-parallel"),
        (2, "decoder.layers.1.self_attention.router.weight", "2 tensor-parallel"),
    ],
)
def test_drift_is_named_on_every_rank(data: dict, tensor: int, name: str, where: str) -> None:
    assert run_ranks(2, drift, data, tensor, name) == [f"{name} is not the same on all {where} ranks"] * 2
