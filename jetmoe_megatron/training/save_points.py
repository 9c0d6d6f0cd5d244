"""At which steps a run saves, and which checkpoints are never deleted."""

from __future__ import annotations

from itertools import accumulate

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run


class SavePoints:
    """The ends of the phases, and the first whole step at or after each multiple of a number of tokens."""

    def __init__(self, run: Run, layout: Layout) -> None:
        self._options, self._tokens_per_step = run.checkpoint, run.batch.global_tokens
        self._ends = set(accumulate(layout.phase_steps))

    def is_due(self, step: int) -> bool:
        """step: the number of steps that are done."""
        return step in self._ends or self._passes(self._options.every_tokens, step)

    def after(self, step: int) -> int:
        """The next step at which it is due. `step` is not the last one of all phases."""
        next_end, every = min(end for end in self._ends if end > step), self._options.every_tokens
        if not every:
            return next_end
        next_multiple = (step * self._tokens_per_step // every + 1) * every
        return min(next_end, -(-next_multiple // self._tokens_per_step))

    def is_permanent(self, tokens: int) -> bool:
        step = tokens // self._tokens_per_step
        return step in self._ends or self._passes(self._options.keep_every_tokens, step)

    def _passes(self, every: int, step: int) -> bool:
        per_step = self._tokens_per_step
        return every > 0 and step * per_step // every > (step - 1) * per_step // every
