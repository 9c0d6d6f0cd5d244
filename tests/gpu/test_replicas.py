"""`debug.check_sync` compares weights and random states in one exchange: both must lie on the GPU."""

from __future__ import annotations

from pathlib import Path

from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model.build import build_model
from jetmoe_megatron.training.ranks.replicas import _copies, _fingerprint
from tests.support import small_run


def test_what_is_compared_lies_on_the_gpu(data: dict, world_of_one: None, tmp_path: Path) -> None:
    run = Run.model_validate(small_run(tmp_path, data, precision="bf16"))
    compared = [copies for _, _, copies in _copies(build_model(run, resolve_layout(run, 1)))]
    assert any("random state" in name for copies in compared for name in copies)
    for copies in compared:
        assert all(_fingerprint(tensor).is_cuda for tensor in copies.values())
