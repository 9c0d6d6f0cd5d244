"""Megatron's process groups for one run."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from data_tools.errors import InputError
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import SharedError
from jetmoe_megatron.model.attention_kernel import attention_kernel
from jetmoe_megatron.runtime.device import process_group
from jetmoe_megatron.runtime.flight_recorder import record_into, remove_empty, write_dump
from jetmoe_megatron.runtime.machine import first_difference, this_machine
from jetmoe_megatron.runtime.meeting import Judge
from jetmoe_megatron.training.ranks.warm_up import warm_up_groups


@contextlib.contextmanager
def parallel_groups(run: Run, layout: Layout) -> Iterator[None]:
    """Join the world, then split it into tensor, pipeline, expert and data-parallel groups."""
    with joined_groups(run, layout, first_difference) as seconds:
        if torch.distributed.get_rank() == 0:
            print(f"each rank has: {this_machine()}", flush=True)
            print(f"attention: {attention_kernel(run, layout)}", flush=True)
            print(f"groups: warmed up in {seconds:.2f} s", flush=True)
        yield


@contextlib.contextmanager
def joined_groups(run: Run, layout: Layout, judge: Judge) -> Iterator[float]:
    """As `parallel_groups`, without a word. The judge says in what the ranks may not differ.

    Yields the seconds that the warm-up took.
    """
    _quiet_megatron()
    dumps = record_into(RunFolder.of(run).logs / "flight_recorder")
    with process_group(run.parallel.start_timeout_minutes, judge), _dumped(dumps), split_world(run, layout):
        yield warm_up_groups(run, layout)


@contextlib.contextmanager
def split_world(run: Run, layout: Layout) -> Iterator[None]:
    """Split the world that this rank has joined into Megatron's groups."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=run.parallel.start_timeout_minutes,
    )
    model_parallel_cuda_manual_seed(run.seed)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def _dumped(dumps: Path) -> Iterator[None]:
    try:
        yield
    except SharedError:  # of all ranks
        remove_empty(dumps)
        raise
    except InputError:
        raise
    except Exception:
        write_dump(dumps)
        raise
    remove_empty(dumps)


def _quiet_megatron() -> None:
    """Hide messages that every run would repeat."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")  # deprecated names
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # which is the right one
    logging.getLogger("megatron.core.datasets.blended_dataset").setLevel(logging.ERROR)
