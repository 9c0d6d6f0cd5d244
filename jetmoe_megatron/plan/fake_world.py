"""One rank of a world of any size in this process: torch's fake process groups, whose collectives return at once."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import Backend
from torch.testing._internal.distributed.fake_pg import FakeStore

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.runtime import cpu
from jetmoe_megatron.runtime.matmul import choose_matmul
from jetmoe_megatron.training.ranks.process_groups import split_world

NOWHERE = torch.device("meta")  # tensors here have shapes, but no numbers


@contextlib.contextmanager
def fake_world(run: Run, layout: Layout, rank: int) -> Iterator[None]:
    """This process is `rank` of the layout's world, in Megatron's groups. What is asked for on a GPU has no numbers.

    No process group may exist.
    """
    cpu.install()
    choose_matmul()
    devices = Backend.backend_capability[Backend.FAKE]
    if NOWHERE.type not in devices:
        devices.append(NOWHERE.type)
    with warnings.catch_warnings(), cpu.placed_on(NOWHERE), patch.object(torch.distributed, "all_gather_object", _same):
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch's, about its own names
        torch.distributed.init_process_group(Backend.FAKE, store=FakeStore(), rank=rank, world_size=layout.world)
        try:
            with split_world(run, layout):
                yield
        finally:
            torch.distributed.destroy_process_group()


def _same(gathered: list[Any], own: Any, group: Any = None) -> None:
    """Every rank says what this one says. torch's own would need the numbers of a tensor."""
    gathered[:] = [own] * len(gathered)
