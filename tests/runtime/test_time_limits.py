"""A time limit that is set later holds in every group."""

from __future__ import annotations

import os
import time

from tests.ranks import run_ranks


def limited() -> list[str]:
    """Rank 1 comes to no collective. Returns how each ended on the others."""
    import torch

    from jetmoe_megatron.runtime.device import process_group
    from jetmoe_megatron.runtime.time_limits import set_time_limit

    ended: list[str] = []
    with process_group():
        groups = [torch.distributed.new_group([0, 1]), torch.distributed.group.WORLD]
        for group in groups:
            torch.distributed.all_reduce(torch.ones(1), group=group)
        set_time_limit(0.03)
        if os.environ["RANK"] == "1":
            time.sleep(10)
            return ended
        for group in groups:
            began = time.monotonic()
            try:
                torch.distributed.all_reduce(torch.ones(1), group=group)
            except RuntimeError as error:
                ended.append(f"{'Timed out waiting 1800ms' in str(error)} {time.monotonic() - began < 8}")
    return ended


def test_in_all_groups() -> None:
    assert run_ranks(2, limited) == [["True True"] * 2, []]
