"""What is measured of a step beside its loss: routers, norms, times, memory; and its profile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.training.norms import Norms
from jetmoe_megatron.training.profiler import Profiler
from jetmoe_megatron.training.rank_speed import RankSpeed
from jetmoe_megatron.training.router_metrics import RouterSums
from jetmoe_megatron.training.step_times import StepTimes


class Observers:
    """All ranks call each method once in a step, in their order here; `update` only if the step changes weights."""

    def __init__(self, run: Run, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._routers, self._norms = RouterSums(run, model), Norms(model, optimizer)
        self._times, self._speed = StepTimes(model), RankSpeed(model)
        self._profiler = Profiler(run, model, optimizer)
        self._step, self._record = 0, Record()

    def begin(self, step: int) -> None:
        self._step, self._record = step, Record()
        self._times.begin()
        self._profiler.begin(step)

    def gradients(self) -> float:
        """After the gradients. Returns the seconds in which this rank computed what waits for no other."""
        if self._routers.is_due(self._step, last=False):
            self._record |= self._norms.of_gradients()
        self._routers.add_step()
        return self._speed.seconds()

    @contextmanager
    def update(self) -> Iterator[None]:
        """Around the update of the weights."""
        with self._times.optimizer():
            yield
        if self._routers.is_due(self._step, last=False):
            self._record |= self._norms.of_update()

    def end(self, tokens: int, last: bool) -> Record:
        """After `tokens` tokens. last: step of this start."""
        self._profiler.end(self._step)
        self._record |= self._times.seconds()
        if self._routers.is_due(self._step, last):
            self._record |= self._routers.record(self._step, tokens)
        return self._record

    def close(self) -> None:
        self._profiler.close()
