"""TensorBoard: the numbers of metrics.jsonl, in groups."""

from __future__ import annotations

from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.monitor.names import grouped


class TensorBoard:
    def __init__(self, run: Run, step: int) -> None:
        """What an earlier process wrote for steps after `step` is no longer shown."""
        from torch.utils.tensorboard import SummaryWriter  # an optional package, like wandb

        self.writer = SummaryWriter(str(RunFolder.of(run).logs / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        self.amend(int(record["step"]), record)

    def amend(self, step: int, values: Record) -> None:
        for key, value in grouped(values).items():
            if isinstance(value, int | float):
                self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()
