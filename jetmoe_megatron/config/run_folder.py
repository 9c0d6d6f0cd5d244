"""Where the files of a run lie."""

from __future__ import annotations

from pathlib import Path

from jetmoe_megatron.config.schema import Run


class RunFolder:
    def __init__(self, run: Run) -> None:
        self.root = Path(run.output_dir)
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.bad_steps = self.root / "bad_steps.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.exports = self.root / "hf"
        self.logs = self.root / "logs"
        self.data_cache = Path(run.data.cache) if run.data.cache else self.root / "data_index"
