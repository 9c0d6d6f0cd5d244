"""TensorBoard: the numbers of metrics.jsonl, under the same names."""

from __future__ import annotations

from pathlib import Path

from jetmoe_megatron.monitor.monitor import Record


class TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        """What an earlier process wrote for steps after `step` is no longer shown."""
        from torch.utils.tensorboard import SummaryWriter  # an optional package, like wandb

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: Record) -> None:
        self.amend(int(record["step"]), record)

    def amend(self, step: int, values: Record) -> None:
        for key, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()
