"""The ordered map: order, bounds, failures and the end of its processes."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from data_tools.errors import InputError
from data_tools.parallel import ordered_map


def _slow_first(item: int) -> int:
    time.sleep(0.2 if item == 0 else 0)
    return item * item


def _fail_at_three(item: int) -> int:
    if item == 3:
        raise InputError("three")
    return item


def _holds_interrupts_back(item: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def _sleep_long(item: int) -> int:
    time.sleep(60 * item)
    return item


def _die(item: int) -> int:
    os._exit(1)


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    """Other tests of the same pytest may have children of their own."""
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


def test_results_come_in_order() -> None:
    assert list(ordered_map(_slow_first, range(50), 2)) == [i * i for i in range(50)]


def test_items_are_taken_as_results_are_used() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    with closing(ordered_map(_slow_first, items(), 2)) as results:
        next(results)
        assert len(taken) == 5
    assert len(taken) == 5


def test_an_error_of_the_function_arrives_as_it_is() -> None:
    results = ordered_map(_fail_at_three, range(10), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="three"):
        next(results)


def test_who_closes_it_does_not_wait_for_what_workers_are_at() -> None:
    results = ordered_map(_sleep_long, range(3), 2)
    assert next(results) == 0
    closed = time.monotonic()
    results.close()
    assert time.monotonic() - closed < 20


def test_a_dead_worker_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(InputError, match="a worker process died"):
        list(ordered_map(_die, range(10), 2))


def test_only_the_parent_hears_a_ctrl_c() -> None:
    assert all(ordered_map(_holds_interrupts_back, range(3), 1))
    assert not _holds_interrupts_back(0)
