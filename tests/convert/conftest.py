from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from jetmoe_megatron.convert.hf_config import hf_config
from tests.support import small_run

# Every shape differs from transformers' defaults.
SHAPE = {"norm_eps": 1e-3, "rope_theta": 2000.0, "num_experts": 6, "init_std": 0.2}

# transformers' name: the original repository's
ORIGINAL = {
    "num_local_experts": "moe_num_experts",
    "intermediate_size": "ffn_hidden_size",
    "num_experts_per_tok": "moe_top_k",
    "num_hidden_layers": "num_layers",
    "rms_norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "n_positions",
}


@dataclass
class Saved:
    """A checkpoint and the model it was written from."""

    checkpoint: Path
    model: Any
    tree: dict[str, Any]

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.eval()(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


@pytest.fixture(scope="session")
def save(world_of_one: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """Write a checkpoint from this one process; keyword arguments change the run."""

    def save(**changes: Any) -> Saved:
        from jetmoe_megatron.checkpoint.saver import Saver
        from jetmoe_megatron.config import Run
        from jetmoe_megatron.config.layout import resolve_layout
        from jetmoe_megatron.model.build import build_model
        from jetmoe_megatron.training.optimizer import build_optimizer, wrap_for_data_parallel
        from tests.convert.saved_by_ranks import disturb

        folder = tmp_path_factory.mktemp("saved")
        shape = {f"model__{name}": value for name, value in SHAPE.items()}
        tree = small_run(folder, {"code": "unused", "prose": "unused"}, **{**shape, **changes})
        run = Run.model_validate(tree)
        model = wrap_for_data_parallel(run, build_model(run, resolve_layout(run, 1)))
        disturb(model)
        optimizer = build_optimizer(run, model)
        saver = Saver(folder / "run/checkpoints", run, is_kept=lambda tokens: False)
        saver.save({"tokens": 2048, "data": {}}, model, optimizer, wait=True)
        return Saved(folder / "run/checkpoints/tokens_2048", model[0], tree)

    return save


@pytest.fixture(scope="session")
def saved(save: Callable[..., Saved]) -> Saved:
    return save()


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A folder as transformers itself writes one, with random weights, norms and biases too."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    from jetmoe_megatron.config.schema import Model

    model = Model.model_validate({**small_run(tmp_path, {"code": "", "prose": ""})["model"], **SHAPE})
    torch.manual_seed(0)
    config = hf_config(model, 64, "float32", {})
    network = JetMoeForCausalLM(JetMoeConfig(**{k: v for k, v in config.items() if k not in ORIGINAL.values()}))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2)
    network.save_pretrained(tmp_path / "released")
    return tmp_path / "released"
