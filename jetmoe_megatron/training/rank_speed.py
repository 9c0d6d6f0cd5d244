"""How fast this rank computes, in a call that waits for no other rank.

The ranks of a step wait for each other, so that the slowest of them hides behind the time of the step. The attention
between queries, keys and values exchanges nothing, and has the same shapes on all ranks: here it is timed in the first
layer of each stage. With context parallelism, where it passes keys around, nothing is timed.

Letters: S sequence, B micro-batch, G query heads, N kv heads, C channels, D = G * C.
"""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from jetmoe_megatron.model.attention import MixtureOfAttention
from jetmoe_megatron.runtime.moments import Moment, moment, seconds_between


class RankSpeed:
    """Times the calls of a step, and has their mean one step later: a GPU's clock can then be read without a wait."""

    def __init__(self, model: list[DistributedDataParallel]) -> None:
        first = next(module for chunk in model for module in chunk.modules() if isinstance(module, MixtureOfAttention))
        self._now: list[tuple[Moment, Moment]] = []  # when a call began and ended
        self._before: list[tuple[Moment, Moment]] = []
        self._attend = first.core_attention
        if first.config.context_parallel_size == 1:
            first.core_attention = self._timed

    def seconds(self) -> float:
        """Of a call, on average over the step before; 0 if there was none. Call it once after each step."""
        took = [seconds_between(*moments) for moments in self._before]
        self._before, self._now = self._now, []
        return sum(took) / len(took) if took else 0.0

    def _timed(self, q_SBGC: Tensor, k_SBNC: Tensor, v_SBNC: Tensor, mask: Tensor | None) -> Tensor:
        began = moment()
        a_SBD = self._attend(q_SBGC, k_SBNC, v_SBNC, mask)
        self._now.append((began, moment()))
        return a_SBD
