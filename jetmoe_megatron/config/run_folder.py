"""Where the files of a run are."""

from __future__ import annotations

from pathlib import Path

from jetmoe_megatron.config.schema import Run

LOCK = ".lock"


class RunFolder:
    """`output_dir` of a run. README.md says what is in it."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.lock = self.root / LOCK  # held by the run that trains
        self.metrics = self.root / "metrics.jsonl"
        self.routers = self.root / "routers.jsonl"
        self.bad_steps = self.root / "bad_steps.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.rollbacks = self.checkpoints / "rollbacks.json"
        self.exports = self.root / "hf"
        self.logs = self.root / "logs"
        self.profile = self.logs / "profile"
        self.starts = self.root / "starts.jsonl"
        self.launches = self.root / "launches"
        self.doctor = self.root / "doctor"
        self.report = self.root / "report.html"

    @classmethod
    def of(cls, run: Run) -> RunFolder:
        return cls(run.output_dir)


def data_cache(run: Run) -> Path:
    """The folder of the sample indices: `data.cache`, or a folder in the run folder if that is not set."""
    return Path(run.data.cache) if run.data.cache else Path(run.output_dir) / "data_index"
