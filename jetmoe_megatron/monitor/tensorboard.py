"""TensorBoard: the numbers of metrics.jsonl, under the same names."""

from __future__ import annotations

from pathlib import Path

from jetmoe_megatron.monitor.monitor import Record


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an extra, as wandb

        self.writer = SummaryWriter(str(folder))

    def write(self, record: Record) -> None:
        for key, value in record.items():
            if not isinstance(value, str):
                self.writer.add_scalar(key, value, int(record["step"]))

    def close(self) -> None:
        self.writer.close()
