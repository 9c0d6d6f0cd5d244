"""Who is named at the deadline. The deadline itself: tests/training/ranks/test_warm_up.py."""

from __future__ import annotations

import pytest
import torch

from jetmoe_megatron.runtime import roll_call


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ([1, None, 0], "rank 1 of 3 did not come"),
        ([1, 2, 1], "rank 0, 2 of 3 did not get past: b"),
        ([2, 2, 2], "rank 0, 1, 2 of 3 came too late"),  # after the deadline, before all were asked
    ],
)
def test_the_ranks_that_are_furthest_behind(at: list[int | None], said: str) -> None:
    store = torch.distributed.HashStore()
    for rank, place in enumerate(at):
        if place is not None:
            store.set(str(rank), str(place))
    assert roll_call._furthest_behind(store, len(at), ["a", "b"]) == said
