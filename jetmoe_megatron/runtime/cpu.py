"""Megatron-Core on a machine without a GPU.

Megatron-Core assumes CUDA. `install()` replaces the CUDA calls that it makes while it trains on the CPU over gloo.
Importing this module patches nothing, and with a GPU nothing is ever patched. Each entry names the file or function of
megatron/core that needs it. `tests/runtime/test_cpu.py` fails if another version needs other entries.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

_place = torch.device("cpu")  # where what Megatron-Core wants on the GPU is
_installed = False


def place() -> torch.device:
    """The device that replaces the GPU."""
    return _place


@contextlib.contextmanager
def placed_on(device: torch.device) -> Iterator[None]:
    """Within it, another device than the CPU replaces the GPU. `install` must have been called."""
    global _place
    before, _place = _place, device
    try:
        yield
    finally:
        _place = before


class _Inert:
    """A CUDA stream or event: CPU work is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = wait = record = _nothing

    def record_event(self, *args: Any) -> _Inert:
        return self

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


_STREAM = _Inert()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _set_cpu_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


# torch.cuda attribute -> (replacement, a file of megatron/core that uses it)
CUDA_PATCHES: dict[str, tuple[Any, str]] = {
    "current_device": (place, "tensor_parallel/layers.py"),
    "Stream": (_Inert, "transformer/moe/token_dispatcher.py"),
    "Event": (_Inert, "models/common/model_chunk_schedule_plan.py"),
    "current_stream": (lambda *a: _STREAM, "transformer/moe/token_dispatcher.py"),
    "stream": (lambda stream: contextlib.nullcontext(), "transformer/moe/token_dispatcher.py"),
    "get_rng_state": (lambda *a: torch.get_rng_state(), "tensor_parallel/random.py"),
    "set_rng_state": (_set_cpu_rng_state, "tensor_parallel/random.py"),
    "manual_seed": (torch.manual_seed, "tensor_parallel/random.py"),
}


def install() -> None:
    """Let Megatron-Core run on the CPU. Call it once, before a process group or a model exists.

    Raises:
        RuntimeError: if a GPU is present, where Megatron-Core needs no adapter.
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
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]  # pipeline_parallel/utils.py, `ScheduleNode`
    torch.Tensor.type = _type_as_cuda(torch.Tensor.type)  # type: ignore[method-assign]
    _patch_megatron()
    _installed = True


def _type_as_cuda(original: Any) -> Any:
    """Megatron sorts parameters by type names like 'torch.cuda.FloatTensor'.

    Source: optimizer/optimizer.py, `Float16OptimizerWithFloat16Params`.
    """

    @functools.wraps(original)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return tensor_type


class _Overlay:
    """A module as one module of Megatron-Core sees it: some names are replaced, for that module only.

    Replacing torch.tensor itself would affect other libraries: transformers' loading compares it by identity.
    """

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _cuda_literal_is_place(factory: Any) -> Any:
    @functools.wraps(factory)
    def in_place(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _place
        return factory(*args, **kwargs)

    return in_place


def _all_gather(parts: list[torch.Tensor], own: torch.Tensor, group: Any) -> None:
    """NCCL's all_gather of parts of different sizes, which gloo refuses."""
    parts[group.rank()].copy_(own)
    for rank, part in enumerate(parts):
        torch.distributed.broadcast(part, group_src=rank, group=group)


def _reduce_scatter(own: torch.Tensor, parts: list[torch.Tensor], group: Any) -> None:
    """NCCL's reduce_scatter of parts of different sizes, which gloo refuses."""
    for rank, part in enumerate(parts):
        part = part.contiguous().clone()
        torch.distributed.reduce(part, group_dst=rank, group=group)
        if rank == group.rank():
            own.copy_(part)


def _without_transformer_engine() -> None:
    """If Transformer Engine can be imported, Megatron uses its optimizer and norms, which need a GPU.

    Source: the imports of optimizer/__init__.py, optimizer.py, clip_grads.py and distrib_optimizer.py.
    """
    from megatron.core import optimizer as optimizers
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    optimizers.Adam, optimizers.SGD, optimizers.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, torch.optim.SGD, True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    for module in (optimizer, clip_grads):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale


def _patch_megatron() -> None:
    from megatron.core import utils
    from megatron.core.models.common import model_chunk_schedule_plan
    from megatron.core.models.gpt import fine_grained_callables
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel import utils as pipeline_utils
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import token_dispatcher

    _without_transformer_engine()
    # These modules hard-code device='cuda'.
    factories = {name: _cuda_literal_is_place(getattr(torch, name)) for name in ("tensor", "zeros")}
    for module in (optimizer, clip_grads, schedules, utils):
        module.torch = _Overlay(torch, **factories)

    # In 0.16, they mark ranges for NVIDIA's profiler without being asked.
    marks = _Overlay(
        torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing, range=lambda name: contextlib.nullcontext()
    )
    for module in (pipeline_utils, model_chunk_schedule_plan, fine_grained_callables):
        module.torch = _Overlay(torch, cuda=_Overlay(torch.cuda, nvtx=marks))

    # The token dispatcher gathers uneven numbers of tokens over expert-tensor ranks (mappings.py,
    # `_gather_along_first_dim`).
    collectives = _Overlay(torch.distributed, all_gather=_all_gather, reduce_scatter=_reduce_scatter)
    mappings.torch = _Overlay(torch, distributed=collectives)

    # Both reach into torch.cuda.default_generators.
    random._set_cuda_rng_state = _set_cpu_rng_state
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()

    # Megatron converts its all-to-all split sizes to numpy only if they are on a GPU (moe_utils.py,
    # `maybe_move_tensor_to_cpu`).
    original = token_dispatcher.maybe_move_tensor_to_cpu

    def split_sizes_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, torch.Tensor):
            return tensor.cpu().numpy()
        return original(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes_on_host
