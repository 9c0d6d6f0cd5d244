"""Memory that grows is noticed; a jump and noise are not."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import random
from collections.abc import Callable

import pytest

from jetmoe_megatron.monitor.memory_growth import WINDOW, MemoryGrowth
from jetmoe_megatron.runtime.memory import grown_memory
from tests.monitor.test_alarms import alarms, raised, record

NAME = "host_memory_gb"
MB_100 = 100 * 2**20


def alarms_of(memory: Callable[[int], float], limit: float | None = 0.02) -> list[tuple[int, str]]:
    growth, steps = MemoryGrowth(), []
    for step in range(1, 2 * WINDOW + 1):
        of_step = record(step, **{NAME: memory(step)})
        steps.append(of_step | growth.add(of_step))
    return raised(alarms(memory=limit), steps)


def test_growth() -> None:
    growth = MemoryGrowth()
    *before, slopes = [growth.add({"step": step, NAME: 8 + step / 1000}) for step in range(1, WINDOW + 1)]
    assert not any(before) and slopes == {"host_memory_gb_per_1000_steps": pytest.approx(1.0)}
    assert alarms_of(lambda step: 8 + step / 1000) == [(WINDOW, f"memory/{NAME}")]
    assert alarms_of(lambda step: 8 + step / 1000, limit=None) == []


def test_what_is_no_growth() -> None:
    noise = random.Random(0)
    assert alarms_of(lambda step: 8 + (step > 300)) == []  # the first checkpoint
    assert alarms_of(lambda step: 8 + (step > 300) + (step > 900)) == []
    assert alarms_of(lambda step: 8 + noise.random() / 4) == []
    assert alarms_of(lambda step: 8 - step / 1000) == []


def hold(ready: multiprocessing.synchronize.Event, done: multiprocessing.synchronize.Event) -> None:
    held = bytearray(MB_100)
    ready.set()
    done.wait(60)
    assert held


def test_what_this_process_and_its_children_hold() -> None:
    before = grown_memory()
    held = bytearray(MB_100)
    assert 0.9 * MB_100 < grown_memory() - before < 1.5 * MB_100
    del held
    before, context = grown_memory(), multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    child = context.Process(target=hold, args=(ready, done))
    child.start()
    assert ready.wait(60)
    assert grown_memory() - before > 0.9 * MB_100
    done.set()
    child.join(60)
