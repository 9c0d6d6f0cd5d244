"""One line for what all ranks of a node find, at once for what one of them finds, and nobody waits for himself."""

from __future__ import annotations

import os
import time

import pytest

from tests.ranks import run_ranks


def speaking(first: str, local_world: str = "2") -> tuple[bool, float]:
    """The first rank does as `first` says; the other has found something wrong in its checks."""
    from jetmoe_megatron.runtime.first_rank import Stage, first_rank_speaks, has_spoken, is_first_rank, passed

    os.environ["LOCAL_WORLD_SIZE"] = local_world
    began = time.monotonic()
    if is_first_rank():
        passed(Stage.BEGUN)
        time.sleep(1)
        if first == "passes":
            passed(Stage.HAS_DEVICE)
            passed(Stage.CHECKED)
        elif first == "speaks":
            has_spoken()
        if first != "dies":
            time.sleep(3)
        return True, 0.0
    return first_rank_speaks(after=Stage.CHECKED), time.monotonic() - began


@pytest.mark.parametrize(("first", "speaks"), [("speaks", True), ("passes", False), ("dies", False)])
def test_another_rank_waits_for_the_first(first: str, speaks: bool) -> None:
    spoke, seconds = run_ranks(2, speaking, first)[1]
    assert spoke is speaks
    assert seconds < 20  # not FIRST_RANK_SPEAKS


def test_a_rank_alone_on_its_node_is_the_first() -> None:
    assert run_ranks(2, speaking, "passes", "1") == [(True, 0.0)] * 2


def in_a_taken_name() -> None:
    """Another start has the same rendezvous: this one still ends in one line."""
    from jetmoe_megatron.runtime import first_rank

    first_rank.passed(first_rank.Stage.BEGUN)
    taken = first_rank._listening.pop(first_rank.Stage.BEGUN)
    first_rank.passed(first_rank.Stage.BEGUN)
    assert not first_rank._listening
    first_rank.has_spoken()
    taken.close()


def test_a_taken_name_is_no_error() -> None:
    run_ranks(1, in_a_taken_name)
