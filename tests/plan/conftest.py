from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed import distributed_c10d


@pytest.fixture(autouse=True, scope="module")
def no_process_group() -> Iterator[None]:
    """Groups that other tests have made in this process, for the session, are not seen here: a plan makes its own."""
    world = distributed_c10d._world
    own, count = world.default_pg, world.group_count
    empty: dict[str, Any] = {name: {} for name in ("_pg_map", "_pg_names", "_pg_group_ranks", "_pg_backend_config")}
    with patch.multiple(distributed_c10d, **empty):
        world.default_pg = None
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    world.default_pg, world.group_count = own, count
