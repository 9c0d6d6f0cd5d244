"""When each stage of a pipeline runs which pass of a step, from the order of the passes and the seconds of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jetmoe_megatron.plan.schedule import Order, Pass

GATHER, REDUCTION, UPDATE = "gather", "reduction", "update"


@dataclass(frozen=True)
class StageSeconds:
    """Of a step on one stage, in seconds. Lists have an entry for each chunk, of one pass."""

    forward: list[float]
    recompute: list[float]  # before the backward pass
    backward: list[float]
    message: float  # a result, sent to a neighbour
    gather: float  # of weights, beside the first forward passes
    reduction_beside: float  # of gradients, beside the last backward passes
    reduction: float  # of gradients, after the passes
    update: float  # the rest of the step, on all stages at once

    def of(self, one: Pass) -> float:
        """A pass."""
        if one.direction == "forward":
            return self.forward[one.chunk]
        return self.recompute[one.chunk] + self.backward[one.chunk]


@dataclass(frozen=True)
class Span:
    """In seconds since the step began. What lies between the spans of a stage is idle."""

    direction: str  # forward or backward; gather, reduction: what no pass hides of it; update
    chunk: int
    micro_batch: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


def timeline(orders: Sequence[Order], stages: Sequence[StageSeconds]) -> list[list[Span]]:
    """The spans of each stage.

    A pass starts when its stage is free and its input is there. A message that a stage waits for starts when its
    receiver has done its pass before, too. Gradients are reduced when Megatron starts that. The update needs the
    gradients' norm over all stages, so it starts everywhere at once.
    """
    spans = _passes(orders, stages)
    for order, stage, own in zip(orders, stages, spans, strict=True):
        end = own[-1].end
        reduced = max(end, _reduced(order, stage, own)) + stage.reduction
        if reduced > end:
            own.append(Span(REDUCTION, 0, 0, end, reduced))
    ready = max(own[-1].end for own in spans)
    for stage, own in zip(stages, spans, strict=True):
        own.append(Span(UPDATE, 0, 0, ready, ready + stage.update))
    return spans


def _passes(orders: Sequence[Order], stages: Sequence[StageSeconds]) -> list[list[Span]]:
    spans: list[list[Span]] = [[] for _ in stages]
    done = [0 for _ in stages]  # passes
    results: dict[tuple[str, int, int], tuple[float, float, bool]] = {}  # of a virtual stage and micro-batch
    last = len(stages) * len(stages[0].forward) - 1
    free = [0.0 for _ in stages]  # when the stage may compute again
    while any(count < len(order.passes) for count, order in zip(done, orders, strict=True)):
        before = sum(done)
        for number, (order, stage) in enumerate(zip(orders, stages, strict=True)):
            while done[number] < len(order.passes):
                one = order.passes[done[number]]
                virtual = one.chunk * len(stages) + number
                start = free[number]
                if virtual != (0 if one.direction == "forward" else last):
                    from_where = virtual - 1 if one.direction == "forward" else virtual + 1
                    needed = results.get((one.direction, from_where, one.micro_batch))
                    if needed is None:
                        break
                    end, message, blocks = needed
                    if blocks and spans[number]:
                        end = max(end, spans[number][-1].end)
                    start = max(start, end + message)
                end = _add(one, stage, start, spans[number])
                results[one.direction, virtual, one.micro_batch] = end, stage.message, one.blocks
                free[number] = end + (stage.message if one.blocks else 0.0)
                done[number] += 1
        if sum(done) == before:
            raise ValueError("the stages wait for each other")
    return spans


def _add(one: Pass, stage: StageSeconds, start: float, spans: list[Span]) -> float:
    """Returns the end. The first forward pass of a chunk ends when its weights, gathered chunk by chunk, are there."""
    end = start + stage.of(one)
    spans.append(Span(one.direction, one.chunk, one.micro_batch, start, end))
    if one.direction == "forward" and one.micro_batch == 0:
        gathered = stage.gather * (one.chunk + 1) / len(stage.forward)
        if gathered > end:
            spans.append(Span(GATHER, one.chunk, 0, end, gathered))
            return gathered
    return end


def _reduced(order: Order, stage: StageSeconds, spans: list[Span]) -> float:
    """When the gradients are reduced that are reduced beside passes: those of each chunk take the same time."""
    passes = [span for span in spans if span.direction != GATHER]
    starts = [passes[count - 1].end for count in order.reduces] or [passes[-1].start]
    now = 0.0
    for start in starts:
        now = max(now, start) + stage.reduction_beside / len(starts)
    return now
