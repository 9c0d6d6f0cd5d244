"""The time of a step by part of the model, from a trace of torch's profiler.

The host's events are nested. An event belongs to the range of a part around it; one of the backward pass belongs to the
part of its forward operation, with which the trace links it. On a CPU, each moment of the step belongs to the innermost
event of the training thread. On a GPU, it belongs to the kernel that runs, which belongs where it was launched: to one
that computes if several run, so that an exchange counts only where nothing hides it. Either way the times add up to the
step's.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

EMBEDDING, NORMS, RESIDUALS, OUTPUT = "embedding", "norms", "biases, residuals", "output, loss"
MOA_ROUTER, MOA_DISPATCH, MOA_EXPERTS, MOA = "MoA router", "MoA dispatch", "MoA experts", "MoA attention"
MOE_ROUTER, MOE_DISPATCH, MOE_EXPERTS = "MoE router", "MoE dispatch", "MoE experts"
PIPELINE, REDUCTIONS, OPTIMIZER = "pipeline exchange", "reductions", "optimizer"
ACCUMULATION, REST, IDLE = "gradient accumulation", "rest", "GPU idle"

OF_MODEL = (
    *(EMBEDDING, NORMS, RESIDUALS, OUTPUT),
    *(MOA_ROUTER, MOA_DISPATCH, MOA_EXPERTS, MOA),
    *(MOE_ROUTER, MOE_DISPATCH, MOE_EXPERTS),
)
PARTS = (*OF_MODEL, ACCUMULATION, PIPELINE, REDUCTIONS, OPTIMIZER, REST, IDLE)
STEP = "training step "  # the range of a step, with its number

_HOST = ("cpu_op", "cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
Event = dict[str, Any]
Place = tuple[str, bool]  # the part, and whether it is the backward pass
Spot = tuple[Any, float]  # the thread of an event and its beginning


@dataclass
class Times:
    """Microseconds in all steps together."""

    steps: list[int]
    whole: float
    on_gpu: bool
    of: dict[Place, float] = field(default_factory=lambda: defaultdict(float))

    def table(self) -> str:
        """The mean step, in milliseconds."""
        per_step = 1000 * len(self.steps)
        lines = [f"{'milliseconds of a step':24}{'forward':>12}{'backward':>12}{'together':>12}{'share':>9}"]
        for part in PARTS:
            ways = [self.of.get((part, backward), 0.0) / per_step for backward in (False, True)]
            if any(ways):
                split = "".join(f"{way:12.3f}" for way in ways) if part in OF_MODEL else " " * 24
                share = sum(ways) * per_step / self.whole
                lines.append(f"{part:24}{split}{sum(ways):12.3f}{share:9.1%}")
        lines.append(f"{'step':48}{self.whole / per_step:12.3f}{1:9.1%}")
        return "\n".join(lines) + "\n"


def times_of(trace: dict[str, Any]) -> Times:
    """trace: as `torch.profiler.profile.export_chrome_trace` writes it, with the ranges of `profiler.py`."""
    events: list[Event] = trace["traceEvents"]
    steps = [event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith(STEP)]
    host = [event for event in events if event.get("ph") == "X" and _is_nested(event)]
    device = [event for event in events if event.get("ph") == "X" and event.get("cat") in _DEVICE]
    numbers = [int(step["name"].removeprefix(STEP)) for step in steps]
    times = Times(numbers, sum(step["dur"] for step in steps), on_gpu=bool(device))
    placed = _Placed(host, _forward_operations(events, host))
    if device:
        kernels = [(kernel["ts"], kernel["ts"] + kernel["dur"], placed.launch_of(kernel), kernel) for kernel in device]
        for step in steps:
            _sweep(kernels, step["ts"], step["ts"] + step["dur"], times.of)
    else:
        for event, own, place in placed.own_times:
            if event["tid"] == steps[0]["tid"] and _is_within(event, steps):
                times.of[place] += own
    return times


def _is_nested(event: Event) -> bool:
    """Whether it is a call of the host. Other ranges may begin in a call and end after it, as those of collectives."""
    is_range = event.get("cat") == "user_annotation" and (event["name"] in PARTS or event["name"].startswith(STEP))
    return is_range or event.get("cat") in _HOST


def _is_within(event: Event, steps: list[Event]) -> bool:
    at = bisect_right([step["ts"] for step in steps], event["ts"]) - 1
    return at >= 0 and event["ts"] < steps[at]["ts"] + steps[at]["dur"]


def _forward_operations(events: list[Event], host: list[Event]) -> dict[tuple[int, int], Spot]:
    """Where the forward operation of a backward one is, by the number of its thread and its number in that thread.

    The trace links the two by an arrow.
    """
    tails = {event["id"]: (event["tid"], event["ts"]) for event in _arrows(events, "s")}
    heads = {(event["tid"], event["ts"]): event["id"] for event in _arrows(events, "f")}
    found = {}
    for event in host:
        number, arrow = _backward_number(event), heads.get((event["tid"], event["ts"]))
        if number and arrow in tails:
            found[number] = tails[arrow]
    return found


def _arrows(events: list[Event], end: str) -> Iterator[Event]:
    return (event for event in events if event.get("cat") == "fwdbwd" and event.get("ph") == end)


def _backward_number(event: Event) -> tuple[int, int] | None:
    """None if it is no event of a backward pass."""
    found = event.get("args", {})
    thread = found.get("Fwd thread id", 0)
    return (thread, found["Sequence number"]) if thread and "Sequence number" in found else None


@dataclass
class _Open:
    event: Event
    place: Place
    inside: float = 0.0  # microseconds of the events in it

    @property
    def end(self) -> float:
        return float(self.event["ts"] + self.event["dur"])


class _Placed:
    """Each event of the host with its place, and the time in it that is in no event inside it."""

    def __init__(self, host: Iterable[Event], forward: dict[tuple[int, int], Spot]) -> None:
        self.own_times: list[tuple[Event, float, Place]] = []
        self._place: dict[Spot, Place] = {}
        self._launch: dict[int, Spot] = {}
        open_: dict[Any, list[_Open]] = defaultdict(list)
        for event in sorted(host, key=lambda event: (event["ts"], -event["dur"])):
            stack = open_[event["tid"]]
            while stack and event["ts"] >= stack[-1].end:
                self._close(stack)
            place = self._place_of(event, stack[-1].place if stack else (REST, False), forward)
            self._place[event["tid"], event["ts"]] = place
            if event["cat"].startswith("cuda"):
                self._launch[event["args"].get("correlation", -1)] = event["tid"], event["ts"]
            stack.append(_Open(event, place))
        for stack in open_.values():
            while stack:
                self._close(stack)

    def launch_of(self, kernel: Event) -> Place:
        spot = self._launch.get(kernel["args"].get("correlation", -1))
        place = self._place[spot] if spot else (REST, False)
        return (REDUCTIONS, place[1]) if place[0] in (REST, ACCUMULATION) and _is_exchange(kernel) else place

    def _place_of(self, event: Event, around: Place, forward: dict[tuple[int, int], Spot]) -> Place:
        part, backward = around
        name = event["name"]
        if event["cat"] == "user_annotation" and name in PARTS:
            return name, backward
        if number := _backward_number(event):
            return self._place.get(forward[number], around)[0] if number in forward else part, True
        if name.endswith("torch::autograd::AccumulateGrad"):
            return ACCUMULATION, True
        if name.startswith("c10d::") and part in (REST, ACCUMULATION):
            return REDUCTIONS, backward
        return around

    def _close(self, stack: list[_Open]) -> None:
        done = stack.pop()
        if stack:
            stack[-1].inside += done.event["dur"]
        self.own_times.append((done.event, done.event["dur"] - done.inside, done.place))


def _is_exchange(kernel: Event) -> bool:
    return "nccl" in kernel["name"].lower()


def _sweep(
    kernels: list[tuple[float, float, Place, Event]], begin: float, end: float, times: dict[Place, float]
) -> None:
    """Give each moment from `begin` to `end` to a kernel that runs, or to none."""
    within = sorted(
        (max(start, begin), min(stop, end), place, _is_exchange(kernel))
        for start, stop, place, kernel in kernels
        if start < end and stop > begin
    )
    running: list[tuple[bool, float, float, Place]] = []
    now, waiting = begin, iter(within)
    upcoming = next(waiting, None)
    while now < end:
        while upcoming and upcoming[0] <= now:
            heapq.heappush(running, (upcoming[3], upcoming[0], upcoming[1], upcoming[2]))
            upcoming = next(waiting, None)
        while running and running[0][2] <= now:
            heapq.heappop(running)
        until = min(end, upcoming[0] if upcoming else end, running[0][2] if running else end)
        times[running[0][3] if running else (IDLE, False)] += until - now
        now = until
