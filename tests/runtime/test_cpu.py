"""The adapter replaces exactly what the pinned Megatron-Core uses of CUDA."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest
import torch

from jetmoe_megatron.runtime import cpu

CORE = Path(megatron.core.__file__).parent
# The modules that training runs through; the rest of Megatron-Core is not reached without a GPU.
PATHS = (
    "tensor_parallel/layers.py",
    "tensor_parallel/mappings.py",
    "tensor_parallel/random.py",
    "distributed/distributed_data_parallel.py",
    "distributed/param_and_grad_buffer.py",
    "distributed/finalize_model_grads.py",
    "optimizer/optimizer.py",
    "optimizer/distrib_optimizer.py",
    "optimizer/clip_grads.py",
    "pipeline_parallel/schedules.py",
    "pipeline_parallel/p2p_communication.py",
    "pipeline_parallel/combined_1f1b.py",
    "pipeline_parallel/utils.py",
    "models/common/model_chunk_schedule_plan.py",
    "transformer/transformer_layer.py",
    "transformer/transformer_block.py",
    "transformer/moe/moe_layer.py",
    "transformer/moe/router.py",
    "transformer/moe/token_dispatcher.py",
    "models/gpt/gpt_model.py",
    "models/common/embeddings/rotary_pos_embedding.py",
    "dist_checkpointing/serialization.py",
    "dist_checkpointing/strategies/filesystem_async.py",
    "dist_checkpointing/strategies/async_utils.py",
)
# Asked for only with options that need a GPU: fused kernels, CUDA graphs, activation offloading, FSDP.
NOT_REACHED = {"amp", "CUDAGraph", "MemPool", "default_generators", "random", "nvtx", "is_current_stream_capturing"}
NOT_REACHED |= {"set_device", "device_count"}  # the process of an asynchronous save
NOT_REACHED |= {"_lazy_call", "memory", "graphs", "device", "get_device_properties"}


def test_every_cuda_call_of_the_pinned_version_is_known() -> None:
    """A new version of Megatron-Core that asks for more makes this fail: add a patch, or say why it is not reached."""
    asked = {
        name
        for path in PATHS
        for line in (CORE / path).read_text().splitlines()
        if not line.lstrip().startswith("#")
        for name in re.findall(r"torch\.cuda\.(\w+)", line)
        if not name.endswith("Tensor")  # types named in comparisons, see _type_as_cuda
    }
    assert asked - cpu.CUDA_PATCHES.keys() - NOT_REACHED == set()


def test_every_cuda_literal_of_the_pinned_version_is_known() -> None:
    """Files that write device="cuda" out: the adapter gives them another `torch`."""
    writing = {
        path for path in (*PATHS, "utils.py") if re.search(r"device ?= ?['\"]cuda['\"]", (CORE / path).read_text())
    }
    nccl_only = {"distributed/param_and_grad_buffer.py"}  # line 768: warms up NCCL's registered buffers
    stream = {"pipeline_parallel/utils.py"}  # line 334
    answered = {"optimizer/optimizer.py", "optimizer/clip_grads.py", "pipeline_parallel/schedules.py", "utils.py"}
    assert writing - nccl_only - stream == answered


def test_version_is_the_one_the_adapter_was_written_for() -> None:
    assert megatron.core.__version__ == "0.16.1"


def test_nothing_is_patched_on_import() -> None:
    code = (
        "import torch; before = dict(vars(torch.cuda)), torch.Tensor.type, torch.tensor;"
        "import jetmoe_megatron.runtime.device;"
        "assert (dict(vars(torch.cuda)), torch.Tensor.type, torch.tensor) == before"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_refused_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="must not be installed on a machine with a GPU"):
        cpu.install()


def test_answers(world_of_one: None) -> None:
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.nn.Parameter(torch.ones(1)).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    from megatron.core.optimizer import optimizer

    assert optimizer.torch.tensor([1.0], device="cuda").device.type == "cpu"
    assert optimizer.torch.Tensor is torch.Tensor
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
