"""What a run's numbers say is wrong: docs/monitoring.md says what to do about each.

An alarm is raised once, when its condition begins to hold. It is raised again after the condition has not held.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.monitor.memory_growth import MEMORY, slope_of
from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.monitor.routers import KINDS

_WINDOW = 50  # steps whose mean is judged, so that a single step raises no alarm
_MOSTLY = 0.8  # of these steps


class Alarms:
    """Judges the record of each step."""

    def __init__(self, run: Run) -> None:
        self._limits, self._steps_of_a_line = run.alarms, run.logging.router_every_steps
        self._raised = set[str]()
        self._recent = deque[Record](maxlen=_WINDOW)
        self._lowest_z = dict.fromkeys(KINDS, math.inf)  # mean of a window
        # The last three: held-out loss, training loss since the one before.
        self._held_out: list[tuple[float, float]] = []
        self._since_held_out = 0.0, 0  # sum of the training loss, steps

    def judge(self, record: Record) -> dict[str, str]:
        """Alarms that are raised now: name and what is wrong. The condition of others is remembered.

        record: of a step, with all that was measured after it.
        """
        routers = record.get("routers")
        self._recent.append(record)
        found = dict(self._of_the_step(record))
        judged = {"bad_step"}
        if len(self._recent) == _WINDOW:
            found |= self._of_a_window()
            judged |= {"data_wait", "slow_rank", *(f"z_loss/{kind}" for kind in KINDS)}
        if routers is not None and routers["steps"] >= self._steps_of_a_line:  # fewer steps have too few tokens
            found |= self._of_routers(routers)
            judged |= {f"{name}/{kind}" for name in ("dead_expert", "load", "gate_entropy") for kind in KINDS}
        if measured := {f"memory/{name}" for name in MEMORY if slope_of(name) in record}:
            found |= self._of_memory(record)
            judged |= measured
        if "held_out_loss" in record:
            found |= self._of_held_out(float(record["held_out_loss"]))
            judged.add("held_out_loss")
        raised = {name: message for name, message in found.items() if name not in self._raised}
        self._raised = (self._raised - judged) | set(found)
        return raised

    def _of_the_step(self, record: Record) -> Iterator[tuple[str, str]]:
        if "skipped" in record:
            yield "bad_step", f"this step changes no weight: {record['skipped']}"
        else:
            total, steps = self._since_held_out
            self._since_held_out = total + float(record["lm_loss"]), steps + 1

    def _of_memory(self, record: Record) -> Iterator[tuple[str, str]]:
        limit = self._limits.memory
        for name in MEMORY:
            slope = record.get(slope_of(name))
            if limit is not None and slope is not None and slope > limit * record[name]:
                yield f"memory/{name}", f"{record[name]:.3f} now, and it grows by {slope:.3f} every 1,000 steps"

    def _of_a_window(self) -> Iterator[tuple[str, str]]:
        limits = self._limits
        waited, took = (sum(r[key] for r in self._recent) for key in ("data_wait_seconds", "step_seconds"))
        if limits.data_wait is not None and waited > limits.data_wait * took:
            yield "data_wait", f"{waited / took:.1%} of the last {_WINDOW} steps' time is waiting for data"
        slowest = [r["slowest_rank"] for r in self._recent if "slowest_rank" in r]
        if limits.slow_rank is not None and len(slowest) == _WINDOW:
            rank = max(set(slowest), key=slowest.count)
            ratio = sum(r["slowest_rank_ratio"] for r in self._recent) / _WINDOW
            if slowest.count(rank) >= _MOSTLY * _WINDOW and ratio > limits.slow_rank:
                yield "slow_rank", f"rank {rank} computes {ratio:.2f} times as long as the median of all ranks"
        for kind in KINDS:
            mean = sum(r[f"{kind}_z_loss"] for r in self._recent) / _WINDOW
            lowest = self._lowest_z[kind]
            if limits.z_loss is not None and mean > limits.z_loss * lowest:
                yield f"z_loss/{kind}", f"its mean over {_WINDOW} steps is {mean:.3g} and has been {lowest:.3g}"
            if mean < lowest:  # not if it is NaN
                self._lowest_z[kind] = mean

    def _of_routers(self, routers: dict[str, Any]) -> Iterator[tuple[str, str]]:
        limits, steps = self._limits, routers["steps"]
        for kind in KINDS:
            load_LE, entropy_L = routers[f"{kind}_load"], routers[f"{kind}_gate_entropy"]
            dead = [
                f"{expert} of layer {layer}"
                for layer, load_E in enumerate(load_LE)
                for expert, load in enumerate(load_E)
                if load == 0
            ]
            if limits.dead_experts and dead:
                yield f"dead_expert/{kind}", f"no token in {steps} steps for expert {_some(dead)}"
            over = [
                f"{layer} ({max(load_E):.2f})"
                for layer, load_E in enumerate(load_LE)
                if limits.load is not None and max(load_E) > limits.load
            ]
            if over:
                yield f"load/{kind}", f"one expert takes over {limits.load:g} times an even share: layer {_some(over)}"
            sure = [
                f"{layer} ({entropy:.3f})"
                for layer, entropy in enumerate(entropy_L)
                if limits.gate_entropy is not None and entropy < limits.gate_entropy
            ]
            if sure:
                yield f"gate_entropy/{kind}", f"below {limits.gate_entropy:g} of its largest value: layer {_some(sure)}"

    def _of_held_out(self, loss: float) -> Iterator[tuple[str, str]]:
        (total, steps), self._since_held_out = self._since_held_out, (0.0, 0)
        if not steps:
            return
        self._held_out = [*self._held_out[-2:], (loss, total / steps)]
        if self._limits.held_out_loss and len(self._held_out) == 3:
            (first, before), (second, between), (third, after) = self._held_out
            if first < second < third and before > between > after:
                yield "held_out_loss", f"rises ({first:.4f}, {second:.4f}, {third:.4f}) while the training loss falls"


def _some(things: list[str], most: int = 4) -> str:
    return ", ".join(things[:most]) + (f" and {len(things) - most} more" if len(things) > most else "")
