"""Megatron-Core's own loading reads what we write: a checkpoint is not locked into this program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.oracle import training
from tests.parallel.test_equal_to_one_process import run_tree
from tests.ranks import run_ranks


def save_and_load(tree: dict[str, Any], folder: str) -> tuple[int, int]:
    """How many weights Megatron-Core loads to the bit, and how many there are."""
    with training(tree, 1) as (run, model, _):
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.dict_utils import nested_values

        from jetmoe_megatron.checkpoint.model_state import sharded_model
        from jetmoe_megatron.checkpoint.saver import Saver
        from jetmoe_megatron.training.optimizer import build_optimizer

        saver = Saver(Path(folder), run, lambda tokens: False)
        saver.save({"tokens": 256, "data": {}}, model, build_optimizer(run, model), wait=True)
        assert saver.failed is None
        parts: list[Any] = list(nested_values(sharded_model(model)))
        saved = [part.data.detach().clone() for part in parts]
        for part in parts:
            part.data.detach().zero_()
        state = {"weights": {str(i): part for i, part in enumerate(parts)}}
        loaded = dist_checkpointing.load(state, str(Path(folder) / "tokens_256"))["weights"]
        return sum(torch.equal(loaded[str(i)], values) for i, values in enumerate(saved)), len(saved)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"pipeline": 2}])
def test_weights(parallel: dict[str, int], tmp_path: Path) -> None:
    for equal, all_ in run_ranks(2, save_and_load, run_tree(parallel=parallel), str(tmp_path)):
        assert equal == all_ > 0
