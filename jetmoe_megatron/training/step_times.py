"""The time of a step on this rank by part: forward and backward, the reduction of gradients, the optimizer.

Megatron's schedules name their parts to a `timers` object. Its own one makes all ranks and the GPU wait for each part;
this one notes moments, and has the times one step later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.distributed import DistributedDataParallel

from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.runtime.moments import Moment, moment, seconds_between

# Names in pipeline_parallel/schedules.py and distributed/finalize_model_grads.py. The first includes the reductions.
_WHOLE = "forward-backward"
_REDUCTIONS = (
    "all-grads-sync",
    "conditional-embedder-grads-all-reduce",
    "non-tensor-parallel-grads-all-reduce",
    "embedding-grads-all-reduce",
)
_OPTIMIZER = "optimizer"


class StepTimes:
    """Before a step call `begin`. What the schedules do outside of steps, as for a held-out loss, does not count."""

    def __init__(self, model: list[DistributedDataParallel]) -> None:
        self._timers = {name: _Timer() for name in (_WHOLE, *_REDUCTIONS, _OPTIMIZER)}
        self._before: dict[str, list[tuple[Moment, Moment]]] = {}
        model[0].config.timers = self

    def __call__(self, name: str, log_level: int = 0) -> _Timer | _NoTimer:
        """What Megatron asks for. Parts of a micro-batch are not timed."""
        return self._timers.get(name, _NO_TIMER)

    def begin(self) -> None:
        for timer in self._timers.values():
            timer.spans = []

    @contextmanager
    def optimizer(self) -> Iterator[None]:
        timer = self._timers[_OPTIMIZER]
        timer.start()
        yield
        timer.stop()

    def seconds(self) -> Record:
        """Of the step before; empty if there was none. Call it once after each step."""
        took = {name: sum(seconds_between(*span) for span in spans) for name, spans in self._before.items()}
        self._before = {name: list(timer.spans) for name, timer in self._timers.items()}
        if not took:
            return {}
        reduction = sum(took[name] for name in _REDUCTIONS)
        return {
            "forward_backward_seconds": took[_WHOLE] - reduction,
            "gradient_reduction_seconds": reduction,
            "optimizer_seconds": took[_OPTIMIZER],
        }


class _NoTimer:
    def start(self, barrier: bool = False) -> None:
        pass

    def stop(self, barrier: bool = False) -> None:
        pass


_NO_TIMER = _NoTimer()


class _Timer:
    """Source of the methods: megatron/core/timers.py, `TimerBase`."""

    def __init__(self) -> None:
        self.spans: list[tuple[Moment, Moment]] = []
        self._began: Moment = None

    def start(self, barrier: bool = False) -> None:
        self._began = moment()

    def stop(self, barrier: bool = False) -> None:
        self.spans.append((self._began, moment()))
