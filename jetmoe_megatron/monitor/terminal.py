"""The progress of a run: a line now and then and, on a terminal, a bar below the lines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from data_tools.progress import above, is_terminal
from data_tools.units import duration, shown
from jetmoe_megatron.checkpoint.folder import newest, tokens_of
from jetmoe_megatron.monitor.monitor import Record


class Terminal:
    """
    Attributes:
        saved: tokens of the last checkpoint, looked up for each line.
    """

    def __init__(self, steps: int, every: int, checkpoints: Path) -> None:
        self.steps, self.every = steps, every
        self.checkpoints, self.saved = checkpoints, 0
        self.seconds_per_step: float | None = None
        self.held_out: float | None = None
        self._bar: Any = None

    def write(self, record: Record) -> None:
        step, seconds = int(record["step"]), float(record["step_seconds"])
        before = self.seconds_per_step
        self.seconds_per_step = seconds if before is None else 0.9 * before + 0.1 * seconds
        self.held_out = record.get("held_out_loss", self.held_out)
        left = f"{duration(self.seconds_per_step * (self.steps - step))} left"
        if is_terminal(sys.stdout) and is_terminal(sys.stderr):  # lines of a `tee` would be glued to the bar
            self._show(step, record, left)
        for name, message in record.get("alarms", {}).items():
            if name == "bad_step":  # the loss guard has said it
                continue
            above(f"alarm: step {step}: {name}: {message}", sys.stderr)
        if step % self.every and step != self.steps:
            return
        skipped = f" | SKIPPED: {record['skipped']}" if "skipped" in record else ""
        held_out = f" | held-out {record['held_out_loss']:.4f}" if "held_out_loss" in record else ""
        above(
            f"step {step:>{len(str(self.steps))}}/{self.steps} | {record['phase']} | {record['tokens']:,} tokens"
            f" | loss {record['lm_loss']:.4f}{held_out} | {_routers(record)} | grad norm {record['grad_norm']:.3g}"
            f" | lr {record['lr']:.2e} | {record['tokens_per_second']:,.0f} tokens/s | {left}{skipped}"
        )

    def amend(self, step: int, values: Record) -> None:
        self.held_out = values["held_out_loss"]
        above(f"step {step}/{self.steps} | held-out {self.held_out:.4f}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self, step: int, record: Record, left: str) -> None:
        """The most important first: a narrow terminal cuts the end."""
        if step % self.every == 0 or self._bar is None:
            self.saved = tokens_of(path) if (path := newest(self.checkpoints)) else 0
        if is_new := self._bar is None:
            from tqdm import tqdm

            form = "{percentage:3.0f}%|{bar:10}| {n}/{total} | {desc}"
            options = {"dynamic_ncols": True, "leave": False, "miniters": 1, "bar_format": form}
            self._bar = tqdm(file=sys.stderr, initial=step - 1, total=self.steps, **options)
        rate = f"{record['tokens_per_second']:,.0f} tokens/s"
        parts = [f"loss {record['lm_loss']:.4f}", left, rate]
        parts += [f"held-out {self.held_out:.4f}"] if self.held_out is not None else []
        parts += [f"saved {shown(self.saved, 'tokens')}"] if self.saved else []
        self._bar.set_description_str(" | ".join([*parts, _routers(record)]), refresh=is_new)
        self._bar.update(step - self._bar.n)


def _routers(record: Record) -> str:
    """Of attention and of the MLP."""
    balance, load = (
        "/".join(f"{record[f'{kind}_{name}']:.2f}" for kind in ("moa", "moe"))
        for name in ("balance_loss", "load_imbalance")
    )
    return f"balance {balance} | load {load}"
