"""How far a rank's clock is from rank 0's, by questions and answers through the rendezvous store."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch.distributed import Store

_QUESTIONS = 5  # of which the one with the shortest way counts


@dataclass(frozen=True)
class Offset:
    """Seconds that a clock is ahead of rank 0's, and the seconds by which that may be wrong."""

    ahead: float
    error: float


def clock_offset(store: Store, rank: int, world: int) -> Offset:
    """All ranks call it. Rank 0 answers one rank after the other."""
    if rank == 0:
        for other in range(1, world):
            for question in range(_QUESTIONS):
                store.get(f"{other}/{question}/asked")
                store.set(f"{other}/{question}/told", repr(_now()))
        return Offset(0.0, 0.0)
    return min((_ask(store, f"{rank}/{question}") for question in range(_QUESTIONS)), key=lambda offset: offset.error)


def _ask(store: Store, key: str) -> Offset:
    """The answer was given somewhere between the two readings of the own clock."""
    before = _now()
    store.set(f"{key}/asked", "")
    theirs = float(store.get(f"{key}/told"))
    after = _now()
    return Offset((before + after) / 2 - theirs, (after - before) / 2)


def _now() -> float:
    """Seconds since 1970."""
    return time.time()
