"""Weights & Biases: the content of metrics.jsonl, in groups."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Iterator

import numpy as np

from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.monitor.names import grouped
from jetmoe_megatron.monitor.routers import KINDS
from jetmoe_megatron.monitor.run_id import run_id


class WeightsAndBiases:
    def __init__(self, run: Run, step: int) -> None:
        """A step that was sent before is not replaced: wandb takes steps in ascending order only."""
        import wandb  # an optional package: training/preflight.py has checked that it is installed

        self.run = wandb.init(
            project=run.logging.wandb_project,
            name=run.name,
            id=run_id(run),
            resume="allow",
            mode=run.logging.wandb,  # type: ignore[arg-type]
            dir=str(RunFolder.of(run).logs),
            config=run.model_dump(),
        )

    def write(self, record: Record) -> None:
        self.run.log({**grouped(record), **_histograms(record.get("routers", {}))}, step=int(record["step"]))
        for name, message in record.get("alarms", {}).items():
            self.run.alert(title=f"{name} at step {record['step']}", text=message)

    def amend(self, step: int, values: Record) -> None:
        self.run.log(grouped(values), step=step + 1)  # wandb takes no values for a past step

    def close(self) -> None:
        self.run.finish()


def _histograms(line: Record) -> Record:
    """`routers/moe/load/layer_0`: over the steps, wandb draws a heatmap of the load of each expert."""
    from wandb import Histogram

    return {
        f"routers/{kind}/load/layer_{layer}": Histogram(np_histogram=(np.array(load_E), np.arange(len(load_E) + 1)))
        for kind in KINDS
        for layer, load_E in enumerate(line.get(f"{kind}_load", ()))
    }


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    """Else `wandb.login` asks the server for the user's name, to print it: for a minute, where no server answers."""
    import wandb

    settings = wandb.setup().settings
    before, settings.silent = settings.silent, True
    try:
        yield
    finally:
        settings.silent = before


def check_credentials() -> None:
    """Nothing is sent or asked for.

    Raises:
        UserError: Weights & Biases finds no key in the environment, the netrc file or its settings, or a malformed one.
    """
    import wandb

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _silently():
            if "prompt" in inspect.signature(wandb.login).parameters:
                found = wandb.login(verify=False, prompt=False)
            else:  # an older version
                found = bool(wandb.api.api_key)
    except Exception as error:  # its settings and its keys are checked by classes with no common base
        reason = str(error).partition("\n")[0]
        raise UserError(f"logging.wandb: its key cannot be used: {reason}") from error
    if not found:
        raise UserError(
            "logging.wandb: online, but no key is found: run `wandb login`, set WANDB_API_KEY, or set it to offline"
        )
