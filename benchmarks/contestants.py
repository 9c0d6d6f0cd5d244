"""What the step benchmarks compare: the same model, batch and optimizer, each as a step to call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from transformers import JetMoeConfig, JetMoeForCausalLM

from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.convert.hf_config import hf_config
from jetmoe_megatron.data.step_batches import MicroBatch
from jetmoe_megatron.model import build
from jetmoe_megatron.runtime.device import device, process_group
from jetmoe_megatron.training.metrics import reduce_metrics
from jetmoe_megatron.training.optimizer import build_optimizer, wrap_for_data_parallel
from jetmoe_megatron.training.step import compute_gradients, update_weights

Step = Callable[[], Any]


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    with process_group():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(1234)
        yield
        parallel_state.destroy_model_parallel()


def run_of(model: dict[str, Any], precision: str, length: int, sequences: int, **more: Any) -> Run:
    """A run that is never started: one micro-batch of `sequences` in each step."""
    data = [{"name": "none", "path": "unused", "weight": 1}]
    return Run.model_validate(
        {
            "name": "benchmark",
            "output_dir": "unused",
            "model": model,
            "precision": precision,
            "batch": {
                "sequence_length": length,
                "global_tokens": sequences * length,
                "micro_sequences": sequences,
            },
            "phases": [{"name": "only", "tokens": 1, "learning_rate": "constant", "data": data}],
            **more,
        }
    )


def random_batch(run: Run) -> MicroBatch:
    """Random tokens: the fresh weights of the routers decide how uneven the routing is."""
    sequences, length = run.batch.micro_sequences, run.batch.sequence_length
    text = torch.randint(run.model.vocab_size, (sequences, length + 1), generator=torch.Generator().manual_seed(1))
    return {
        "tokens": text[:, :-1].contiguous().to(device()),
        "labels": text[:, 1:].contiguous().to(device()),
        "loss_mask": torch.ones(sequences, length).to(device()),
        "position_ids": torch.arange(length).expand(sequences, length).contiguous().to(device()),
    }


def our_step(run: Run, micro_batches: int = 1) -> Step:
    """What the training loop does in a step, including the reduction of its losses."""
    (model, optimizer), batch = our_model(run), random_batch(run)

    def step() -> dict[str, float]:
        losses, norm = compute_gradients(model, optimizer, [batch] * micro_batches)
        metrics, _ = reduce_metrics(model, losses, norm, data_wait=0.0, stop=False)
        update_weights(optimizer, norm, 1e-4)
        return metrics.dump()

    return step


def our_model(run: Run) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """As the training loop has them, and its optimizer."""
    model = wrap_for_data_parallel(run, _build(run))
    return model, build_optimizer(run, model)


def bare_step(run: Run) -> Step:
    """Our layers with torch's AdamW on their weights: no schedule, no gradient buffers, no fp32 copies of weights."""
    (model,) = _build(run)
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=1e-4), random_batch(run)

    def step() -> None:
        model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _build(run: Run) -> list[GPTModel]:
    """Weights are drawn on the device: on a CPU, where training draws them, billions of them take minutes."""
    with patch.object(build, "initialize_weights", _draw):
        return build.build_model(run, resolve_layout(run, 1))


@torch.no_grad()
def _draw(model: GPTModel, seed: int, std: float) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, std)
        else:
            parameter.fill_(1.0 if name.endswith("layernorm.weight") else 0.0)


def hugging_face_step(run: Run, micro_batches: int = 1) -> Step:
    """`transformers`' own JetMoE, in the same precision, with torch's AdamW on its weights."""
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    config = JetMoeConfig(**hf_config(run.model, run.batch.sequence_length, str(dtype).removeprefix("torch."), {}))
    config.use_cache = False
    with torch.device(device()):
        model = JetMoeForCausalLM(config).to(dtype).train()
    fused = True if torch.cuda.is_available() else None  # like its Trainer
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused), random_batch(run)

    def step() -> None:
        for _ in range(micro_batches):
            logits = model(batch["tokens"]).logits
            torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
