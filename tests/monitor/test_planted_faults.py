"""A run of two ranks in which a reader stalls, a rank is slow, an expert is dead and a gradient explodes says so."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support import metrics, small_run, training, write_run

STEPS, STALLED, SPIKE = 60, 55, 57


def plant() -> None:
    from jetmoe_megatron.data.step_batches import StepBatches
    from jetmoe_megatron.model.attention import MixtureOfAttention
    from jetmoe_megatron.model.router import Router
    from jetmoe_megatron.training import loop
    from jetmoe_megatron.training.step import compute_gradients

    read, attend = StepBatches.__iter__, MixtureOfAttention.__init__
    gating = Router.gating

    def stall(batches: StepBatches) -> Iterator[Any]:
        for number, batch in enumerate(read(batches), start=1):
            if number == STALLED and os.environ["RANK"] == "0":
                time.sleep(5)
            yield batch

    def slow(module: MixtureOfAttention, *arguments: Any, **named: Any) -> None:
        attend(module, *arguments, **named)
        fast = module.core_attention

        def late(*inputs: Any) -> Any:
            time.sleep(0.005)
            return fast(*inputs)

        if os.environ["RANK"] == "1" and module.layer_number == 1:
            module.core_attention = late

    def dead(router: Router, x: Any) -> Any:
        logits = gating(router, x).clone()
        if router.kind == "moe" and router.layer_number == 2:
            logits[..., 3] -= 1e3
        return logits

    steps = 0

    def explode(*arguments: Any) -> Any:
        nonlocal steps
        losses, norm = compute_gradients(*arguments)
        steps += 1
        return losses, norm * 1e3 if steps == SPIKE else norm

    patch.object(StepBatches, "__iter__", stall).start()
    patch.object(MixtureOfAttention, "__init__", slow).start()
    patch.object(Router, "gating", dead).start()
    patch.object(loop, "compute_gradients", explode).start()


def test_each_raises_its_alarm(tmp_path: Path, data: dict[str, str]) -> None:
    tree = small_run(tmp_path, data, guard={"on_bad_step": "skip", "window": 20, "spike_factor": 10})
    tree["phases"] = [tree["phases"][0] | {"tokens": STEPS * 256}]
    tree["alarms"] = {"slow_rank": 2.0}  # rank 1 takes tens of times as long: noise does not
    result = training(write_run(tmp_path, tree), before=plant).run(2)
    assert result.returncode == 0, result.stderr
    raised = {name: (r["step"], text) for r in metrics(tmp_path / "run") for name, text in r.get("alarms", {}).items()}
    assert raised["dead_expert/moe"] == (20, "no token in 20 steps for expert 3 of layer 1")
    assert raised["slow_rank"][1].startswith("rank 1 computes ")
    assert raised["data_wait"][0] == STALLED
    assert raised["bad_step"][0] == SPIKE and "grad_norm" in raised["bad_step"][1]
    assert f"warning: step {SPIKE}: grad_norm " in result.stderr
    for name, (step, text) in raised.items():
        if name == "bad_step":
            continue
        assert f"alarm: step {step}: {name}: {text}\n" in result.stderr
