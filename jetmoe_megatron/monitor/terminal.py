"""The progress line."""

from __future__ import annotations

import sys

from data_tools.units import duration
from jetmoe_megatron.monitor.monitor import Record


class Terminal:
    def __init__(self, steps: int, every: int) -> None:
        self.steps, self.every = steps, every
        self.seconds_per_step: float | None = None

    def write(self, record: Record) -> None:
        step, seconds = int(record["step"]), float(record["step_seconds"])
        before = self.seconds_per_step
        self.seconds_per_step = seconds if before is None else 0.9 * before + 0.1 * seconds
        for name, message in record.get("alarms", {}).items():
            print(f"alarm: step {step}: {name}: {message}", file=sys.stderr, flush=True)
        if step % self.every and step != self.steps:
            return
        left = duration(self.seconds_per_step * (self.steps - step))
        skipped = f" | SKIPPED: {record['skipped']}" if "skipped" in record else ""
        held_out = f" | held-out {record['held_out_loss']:.4f}" if "held_out_loss" in record else ""
        print(
            f"step {step:>{len(str(self.steps))}}/{self.steps} | {record['phase']} | {record['tokens']:,} tokens"
            f" | loss {record['lm_loss']:.4f}{held_out} | grad norm {record['grad_norm']:.3g} | lr {record['lr']:.2e}"
            f" | {record['tokens_per_second']:,.0f} tokens/s | {left} left{skipped}",
            flush=True,
        )

    def amend(self, step: int, values: Record) -> None:
        print(f"step {step}/{self.steps} | held-out {values['held_out_loss']:.4f}", flush=True)

    def close(self) -> None:
        pass
