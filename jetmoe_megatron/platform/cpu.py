"""Megatron-Core 0.16.1 on a machine without a GPU.

Megatron-Core takes CUDA for granted. `install()` answers the calls it makes while it trains on the CPU over gloo;
nothing is patched on import, and nothing at all where a GPU is present. Each entry names the line of
megatron/core that needs it, and `tests/platform/test_cpu.py` fails when another version needs another one.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

_CPU = torch.device("cpu")
_installed = False


class _Inert:
    """A CUDA stream or event: CPU work is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = synchronize = _nothing

    def record_event(self, *args: Any) -> _Inert:
        return self


_STREAM = _Inert()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _set_cpu_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


# torch.cuda attribute -> (replacement, a line of megatron/core that calls it)
CUDA_PATCHES: dict[str, tuple[Any, str]] = {
    "current_device": (
        lambda: _CPU,
        "tensor_parallel/layers.py:261, distributed/param_and_grad_buffer.py:783",
    ),
    "synchronize": (_nothing, "dist_checkpointing/strategies/filesystem_async.py:230"),
    "empty_cache": (_nothing, "dist_checkpointing/strategies/async_utils.py"),
    "Stream": (_Inert, "transformer/moe/token_dispatcher.py:445"),
    "current_stream": (lambda *a: _STREAM, "transformer/moe/token_dispatcher.py:871"),
    "default_stream": (lambda *a: _STREAM, "distributed/param_and_grad_buffer.py:422"),
    "stream": (lambda stream: contextlib.nullcontext(), "transformer/moe/token_dispatcher.py:874"),
    "get_rng_state": (lambda *a: torch.get_rng_state(), "tensor_parallel/random.py:235"),
    "set_rng_state": (_set_cpu_rng_state, "tensor_parallel/random.py:238"),
    "manual_seed": (torch.manual_seed, "tensor_parallel/random.py:236"),
}


def install() -> None:
    """Let Megatron-Core run on the CPU. Call it once, before a process group or a model exists.

    Raises:
        RuntimeError: if a GPU is present: there Megatron-Core runs as it is.
    """
    global _installed
    if torch.cuda.is_available():
        raise RuntimeError("the CPU adapter must not be installed on a machine with a GPU")
    if _installed:
        return
    for name, (replacement, _) in CUDA_PATCHES.items():
        setattr(torch.cuda, name, replacement)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _type_as_cuda(torch.Tensor.type)  # type: ignore[method-assign]
    _patch_megatron()
    _installed = True


def _type_as_cuda(original: Any) -> Any:
    """optimizer.py:671 and distrib_optimizer.py:361 sort parameters by 'torch.cuda.FloatTensor' and the like."""

    @functools.wraps(original)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return tensor_type


class _TorchWithoutCudaLiterals:
    """`torch` as a module of Megatron-Core sees it, where the factories it calls with device='cuda' make CPU tensors.

    Replacing torch.tensor itself would reach other libraries: transformers' loading compares it by identity.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **_on_cpu(kwargs))

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **_on_cpu(kwargs))


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": _CPU} if kwargs.get("device") == "cuda" else kwargs


def _patch_megatron() -> None:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    # They write device='cuda' out: optimizer.py:907, clip_grads.py:90, schedules.py:596, utils.py:1207.
    for module in (optimizer, clip_grads, schedules, utils):
        module.torch = _TorchWithoutCudaLiterals()

    # random.py:80 reaches into torch.cuda.default_generators.
    random._set_cuda_rng_state = _set_cpu_rng_state
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()

    # token_dispatcher.py:882 turns its all-to-all split sizes into numpy only when they lie on a GPU.
    original = token_dispatcher.maybe_move_tensor_to_cpu

    def split_sizes_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, torch.Tensor):
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes_on_host
