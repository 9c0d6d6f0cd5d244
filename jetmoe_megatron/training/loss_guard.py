"""Is a step good enough to learn from? The rule uses numbers only: ranks with the same numbers decide the same.

A step is bad if its loss or its gradient norm is NaN or infinite, or a spike: a value above

    median + spike_factor * 1.4826 * MAD

of the last `window` good steps. MAD is the median distance from the median; the factor 1.4826 makes it the standard
deviation of a normal distribution. A few outliers change neither. Both numbers are tested: the gradient norm spikes
before the update that does harm, the loss after it. The norm varies by factors, so its logarithm is tested.

A window that is not full decides nothing. A new phase begins with an empty window, because its mixture has another
loss.
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jetmoe_megatron.config.schema import Guard as Options

_NORMAL = 1.4826  # standard deviation / MAD


@dataclass
class Guard:
    options: Options
    phase: str = ""
    losses: list[float] = field(default_factory=list)  # of the good steps in the window
    log_norms: list[float] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)  # steps that the budget counts

    @classmethod
    def load(cls, options: Options, saved: dict[str, Any] | None) -> Guard:
        return cls(options, **(saved or {}))

    def dump(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "options"}

    def back_to(self, saved: dict[str, Any] | None) -> Guard:
        """With a checkpoint's window, but the present count of bad steps: a run that cannot get past a place ends."""
        return replace(Guard.load(self.options, saved), bad=self.bad)

    def judge(self, step: int, phase: str, loss: float, grad_norm: float) -> str | None:
        """Take the step into account. Returns what is wrong with it, or None if it is good."""
        if phase != self.phase:
            self.phase, self.losses, self.log_norms = phase, [], []
        log_norm = math.log(max(grad_norm, sys.float_info.min))
        reason = self._wrong("lm_loss", loss, loss, self.losses)
        reason = reason or self._wrong("grad_norm", grad_norm, log_norm, self.log_norms)
        if reason is None:
            self.losses = [*self.losses, loss][-self.options.window :]
            self.log_norms = [*self.log_norms, log_norm][-self.options.window :]
        else:
            self.bad = [s for s in self.bad if step - s < self.options.window] + [step]
        return reason

    @property
    def is_exhausted(self) -> bool:
        return len(self.bad) > self.options.budget

    @property
    def action(self) -> str:
        """What to do about the step that was just judged bad: "stop", "skip" or "rollback"."""
        return "stop" if self.is_exhausted else self.options.on_bad_step

    def _wrong(self, name: str, shown: float, value: float, window: list[float]) -> str | None:
        if not math.isfinite(shown):
            return f"{name} is {shown}"
        if not self.options.spike_factor or len(window) < self.options.window:
            return None
        median = statistics.median(window)
        deviation = _NORMAL * statistics.median(abs(entry - median) for entry in window)
        above = value - median
        if deviation == 0 or above <= self.options.spike_factor * deviation:
            return None
        return f"{name} {shown:.4g} is a spike: {above / deviation:.1f} deviations above the window's median"
