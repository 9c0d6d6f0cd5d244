"""The learning rate as a pure function of consumed tokens (arXiv 2404.07413, section 4.2).

Linear warm-up from initial_lr_ratio * max_lr over the first warmup_tokens. Each phase then continues from the rate at
which the phase before ended, with its shape (`config/learning_rate_shapes.py`): `constant` keeps the rate,
`exponential` multiplies it by final_lr_ratio over the tokens t of the phase:

    lr(t) = lr_at_start_of_phase * final_lr_ratio ** (t / tokens_of_phase)

After a constant phase, that is max_lr * final_lr_ratio ** (t / decay_tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.learning_rate_shapes import LEARNING_RATES
from jetmoe_megatron.config.schema import Run


@dataclass(frozen=True)
class LearningRate:
    """Call it with the number of tokens consumed before the step."""

    max_lr: float
    warmup_tokens: int
    initial_lr_ratio: float
    final_lr_ratio: float
    phases: Sequence[tuple[int, str]]  # tokens and the name of a shape

    @classmethod
    def of(cls, run: Run, layout: Layout) -> LearningRate:
        """The shape of a phase spans its tokens, rounded up to whole steps."""
        phase_tokens = [steps * run.batch.global_tokens for steps in layout.phase_steps]
        return cls(
            max_lr=run.optimizer.max_lr,
            warmup_tokens=run.schedule.warmup_tokens,
            initial_lr_ratio=run.schedule.initial_lr_ratio,
            final_lr_ratio=run.schedule.final_lr_ratio,
            phases=list(zip(phase_tokens, (phase.learning_rate for phase in run.phases), strict=True)),
        )

    def __call__(self, tokens: int) -> float:
        if tokens < self.warmup_tokens:
            ratio = self.initial_lr_ratio + (1 - self.initial_lr_ratio) * tokens / self.warmup_tokens
            return self.max_lr * ratio
        ratio, start = 1.0, 0
        for length, shape in self.phases:
            progress = min(1.0, (tokens - start) / length)
            ratio *= LEARNING_RATES[shape](progress, self.final_lr_ratio)
            if tokens < start + length:
                break
            start += length
        return self.max_lr * ratio
