"""The adapter replaces exactly what each Megatron-Core that setup.py pins uses of CUDA."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest
import torch

from jetmoe_megatron.runtime import cpu
from tests.support import REPO

# Not `__version__`: newer ones add the commit of the git repository that the environment lies in.
VERSION = importlib.metadata.version("megatron-core")
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
)
# Asked for only with options that need a GPU: fused kernels, CUDA graphs, activation offloading, FSDP, several
# instances of the distributed optimizer, transfers of variable shape, a dispatcher for NVIDIA's newest GPUs.
NOT_REACHED = {"amp", "CUDAGraph", "MemPool", "default_generators", "random", "nvtx", "is_current_stream_capturing"}
NOT_REACHED |= {"_lazy_call", "memory", "graphs", "device", "get_device_properties", "get_device_capability"}
NOT_REACHED |= {"synchronize", "empty_cache", "default_stream"}
# By version, the files that write device="cuda" where the adapter need not answer: NCCL's registered buffers are warmed
# up, and a stream, which the adapter replaces, is made there.
CUDA_LITERALS = {
    "0.16.1": {"distributed/param_and_grad_buffer.py", "pipeline_parallel/utils.py"},
    "0.19.2": {
        "distributed/param_and_grad_buffer.py",
        "pipeline_parallel/utils.py",
        "transformer/moe/moe_layer.py",  # a stream
        "transformer/moe/token_dispatcher.py",  # of the dispatchers for GPUs
    },
}


def test_version_is_one_that_the_adapter_was_written_for() -> None:
    assert VERSION in CUDA_LITERALS, (
        "a new Megatron-Core: read what it does with CUDA (the tests below say where), extend CUDA_PATCHES and "
        "CUDA_LITERALS, run all tests with it, and pin it in setup.py"
    )


def test_setup_pins_these_versions() -> None:
    assert re.findall(r"megatron-core==([\d.]+)", (REPO / "setup.py").read_text()) == list(CUDA_LITERALS)


@pytest.mark.parametrize("name", cpu.CUDA_PATCHES)
def test_each_patch_is_asked_for_where_it_says(name: str) -> None:
    assert re.search(rf"torch\.cuda\.{name}\b", (CORE / cpu.CUDA_PATCHES[name][1]).read_text())


def test_every_cuda_call_is_known() -> None:
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


def test_every_cuda_literal_is_known() -> None:
    """Files that write device="cuda" out: the adapter gives them another `torch`."""
    writing = {
        path for path in (*PATHS, "utils.py") if re.search(r"device ?= ?['\"]cuda['\"]", (CORE / path).read_text())
    }
    answered = {"optimizer/optimizer.py", "optimizer/clip_grads.py", "pipeline_parallel/schedules.py", "utils.py"}
    assert writing == answered | CUDA_LITERALS.get(VERSION, set())


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
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
