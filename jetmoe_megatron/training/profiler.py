"""Records some steps of some ranks with torch's profiler: a trace, the time by part of the model, the GPU's memory.

While it records, hooks and wrapped functions put a range around each part. Otherwise there is nothing in the model.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer import TransformerLayer
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from data_tools.atomic import replacing
from data_tools.progress import above
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model import attention
from jetmoe_megatron.model.attention import MixtureOfAttention
from jetmoe_megatron.model.experts.glu import GLUExperts
from jetmoe_megatron.model.mlp import MixtureOfMLPs
from jetmoe_megatron.model.norm import RMSNorm
from jetmoe_megatron.model.router import Router
from jetmoe_megatron.model.token_dispatcher import Dispatch
from jetmoe_megatron.runtime.device import has_gpu
from jetmoe_megatron.training import metrics, profile_table, step
from jetmoe_megatron.training.profile_table import STEP, times_of

_MOST_ALLOCATIONS = 200_000  # of a memory snapshot, the last ones
_OF_DISPATCH = ("__init__", "rows_of_tokens", "rows_of_slots", "slots_of_rows", "tokens_of_rows")
_OF_DISPATCHER = (
    *("dispatch_preprocess", "token_dispatch", "dispatch_postprocess"),
    *("combine_preprocess", "token_combine", "combine_postprocess"),
)
_OF_OPTIMIZER = ("prepare_grads", "get_grad_norm", "step_with_ready_grads")


class Profiler:
    """Does nothing on ranks and in steps that `profile` does not name."""

    def __init__(self, run: Run, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._rank = torch.distributed.get_rank()
        steps = run.profile.steps if run.profile.steps and self._rank in run.profile.ranks else [0, 0]
        self._first, self._last = steps
        self._folder, self._model, self._optimizer = RunFolder.of(run).profile, model, optimizer
        self._recording: contextlib.ExitStack | None = None
        self._step = contextlib.ExitStack()

    def begin(self, step: int) -> None:
        """Before the step's forward pass."""
        if not self._recording and self._first <= step <= self._last:
            self._start()
        if self._recording:
            _wait_for_gpu()
            self._step.enter_context(record_function(f"{STEP}{step}"))

    def end(self, step: int) -> None:
        """After the step's update. The last step writes the files."""
        if not self._recording:
            return
        _wait_for_gpu()
        self._step.close()
        if step == self._last:
            memory = torch.cuda.memory._snapshot() if has_gpu() else None
            self._stop()
            try:
                self._write(memory)
            except Exception as error:  # a full disk, or a trace that cannot be read, must not end a run
                above(f"warning: profile: {self._folder}: not written: {type(error).__name__}: {error}")

    def close(self) -> None:
        """If training ends within the steps, nothing is written."""
        if self._recording:
            above(f"warning: profile: rank {self._rank} has not come to step {self._last}: nothing is written")
            self._step.close()
            self._stop()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        self._recording = contextlib.ExitStack()
        self._recording.enter_context(_ranges(self._model, self._optimizer))
        if has_gpu():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MOST_ALLOCATIONS)
            self._recording.callback(torch.cuda.memory._record_memory_history, enabled=None)
        self._profile = self._recording.enter_context(profile(activities=activities))

    def _stop(self) -> None:
        assert self._recording
        self._recording.close()
        self._recording = None

    def _write(self, memory: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            file = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(file))
            text = file.read_bytes()
        times = times_of(json.loads(text))
        clock = "GPU" if times.on_gpu else "CPU"
        head = f"rank {self._rank}, mean of steps {times.steps[0]} to {times.steps[-1]}, time of the {clock}\n\n"
        self._put("trace.json.gz", gzip.compress(text, compresslevel=4))
        self._put("txt", (head + times.table()).encode())
        if memory is not None:
            self._put("memory.pickle", pickle.dumps(memory))
        above(f"profile: written: {self._folder / f'rank_{self._rank}.*'}")

    def _put(self, kind: str, content: bytes) -> None:
        with replacing(self._folder / f"rank_{self._rank}.{kind}") as stream:
            stream.write(content)


def _wait_for_gpu() -> None:
    """So that all kernels of a step run within its range."""
    if has_gpu():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _ranges(model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, each part of the model and of the step is a range of the trace."""
    with contextlib.ExitStack() as undo:
        for chunk in model:
            for module in chunk.modules():
                for own, part in _parts_of(module):
                    _add_hooks(own, part, undo)
        for owner, name, part in _functions(model, optimizer):
            _replace(owner, name, _ranged(getattr(owner, name), part), undo)
        of_attention = {name: _ranged(getattr(Dispatch, name), profile_table.MOA_DISPATCH) for name in _OF_DISPATCH}
        _replace(attention, "Dispatch", type("Dispatch", (Dispatch,), of_attention), undo)
        yield


def _parts_of(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    match module:
        case LanguageModelEmbedding():
            yield module, profile_table.EMBEDDING
        case RMSNorm():
            yield module, profile_table.NORMS
        case Router():
            yield module, {"moa": profile_table.MOA_ROUTER, "moe": profile_table.MOE_ROUTER}[module.kind]
        case MixtureOfAttention():
            yield module, profile_table.MOA
            yield module.linear_q, profile_table.MOA_EXPERTS
            yield module.linear_out, profile_table.MOA_EXPERTS
        case GLUExperts():
            yield module, profile_table.MOE_EXPERTS
        case TransformerLayer():
            yield module, profile_table.RESIDUALS
        case GPTModel() if module.post_process:
            yield module.output_layer, profile_table.OUTPUT


def _functions(model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> Iterator[tuple[Any, str, str]]:
    """What is no module's call: an object, the name of its function, and the part."""
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, GPTModel):
                yield module, "compute_language_model_loss", profile_table.OUTPUT
            if isinstance(module, MixtureOfMLPs):
                for name in _OF_DISPATCHER:
                    yield module.token_dispatcher, name, profile_table.MOE_DISPATCH
        yield chunk, "start_param_sync", profile_table.REDUCTIONS
    for name in _OF_OPTIMIZER:
        yield optimizer, name, profile_table.OPTIMIZER
    yield step, "clip_gradients", profile_table.OPTIMIZER
    yield step, "_loss", profile_table.OUTPUT
    yield step, "_tokens_of_a_micro_batch", profile_table.REDUCTIONS
    yield metrics, "_sum_over_ranks", profile_table.REDUCTIONS
    yield model[0].config, "finalize_model_grads_func", profile_table.REDUCTIONS
    yield P2PCommunicator, "_communicate", profile_table.PIPELINE


def _add_hooks(module: nn.Module, part: str, undo: contextlib.ExitStack) -> None:
    open_: list[Any] = []

    def begin(*_: Any) -> None:
        open_.append(record_function(part))
        open_[-1].__enter__()

    def end(*_: Any) -> None:
        open_.pop().__exit__(None, None, None)

    undo.callback(module.register_forward_pre_hook(begin).remove)
    undo.callback(module.register_forward_hook(end, always_call=True).remove)


def _replace(owner: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    """Set an attribute until `undo`."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    undo.callback(*((setattr, owner, name, before) if own else (delattr, owner, name)))


def _ranged(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with record_function(part):
            return function(*arguments, **named)

    return call
