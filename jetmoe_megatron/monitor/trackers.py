"""The trackers that a run asks for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data_tools.atomic import replacing
from jetmoe_megatron.config import dump_run
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.monitor.jsonl import MetricsLines, RouterLines
from jetmoe_megatron.monitor.mlflow import MLflow
from jetmoe_megatron.monitor.monitor import Monitor, Tracker
from jetmoe_megatron.monitor.tensorboard import TensorBoard
from jetmoe_megatron.monitor.terminal import Terminal
from jetmoe_megatron.monitor.wandb import WeightsAndBiases

# By the key of `logging` that switches it on, which is the name of its package too.
OPTIONAL: dict[str, Callable[[Run, int], Tracker]] = {
    "wandb": WeightsAndBiases,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
}


def build_monitor(run: Run, layout: Layout, rank: int, step: int) -> Monitor:
    """Rank 0 writes, and creates the run folder; the others have no trackers. The run continues after `step`."""
    if rank != 0:
        return Monitor([])
    folder = RunFolder.of(run)
    folder.root.mkdir(parents=True, exist_ok=True)
    _write_config(folder.config, run)
    last_step = min(layout.steps, run.debug.max_steps or layout.steps)
    builders: list[Callable[[], Tracker]] = [
        partial(Terminal, last_step, run.logging.every_steps, folder.checkpoints),
        partial(MetricsLines, folder.metrics, step),
        partial(RouterLines, folder.routers, step),
    ]
    builders += [partial(OPTIONAL[name], run, step) for name in switched_on(run)]
    return Monitor(builders)


def switched_on(run: Run) -> list[str]:
    """The names in `OPTIONAL` that the run asks for."""
    return [name for name in OPTIONAL if getattr(run.logging, name) not in (False, "off")]


def _write_config(path: Path, run: Run) -> None:
    """On a full disk, the file of the previous start stays."""
    try:
        with replacing(path) as file:
            file.write(dump_run(run).encode())
    except OSError as error:
        print(f"warning: {path}: not written: {error.strerror}", file=sys.stderr, flush=True)
