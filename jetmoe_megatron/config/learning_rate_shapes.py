"""The shapes that the learning rate can have over a phase. To add one, add a function and its row in the table."""

from __future__ import annotations

from collections.abc import Callable


def _constant(progress: float, final_ratio: float) -> float:
    return 1.0


def _exponential(progress: float, final_ratio: float) -> float:
    return final_ratio**progress


# (the share of the phase that is done, schedule.final_lr_ratio) -> the factor on the rate at the phase's start.
LEARNING_RATES: dict[str, Callable[[float, float], float]] = {"constant": _constant, "exponential": _exponential}
