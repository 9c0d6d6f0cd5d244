"""Weights & Biases: the content of metrics.jsonl, under the same names."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
from collections.abc import Iterator
from pathlib import Path

from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.monitor.monitor import Record


class WeightsAndBiases:
    def __init__(self, run: Run, folder: Path) -> None:
        import wandb  # an optional package: training/preflight.py has checked that it is installed

        self.run = wandb.init(
            project=run.logging.wandb_project,
            name=run.name,
            id=_run_id(run),
            resume="allow",
            mode=run.logging.wandb,  # type: ignore[arg-type]
            dir=str(folder),
            config=run.model_dump(),
        )

    def write(self, record: Record) -> None:
        numbers = {key: value for key, value in record.items() if key != "alarms"}
        self.run.log(numbers, step=int(record["step"]))
        for name, message in record.get("alarms", {}).items():
            self.run.alert(title=f"{name} at step {record['step']}", text=message)

    def amend(self, step: int, values: Record) -> None:
        self.run.log(values, step=step + 1)  # wandb takes no values for a past step

    def close(self) -> None:
        self.run.finish()


def _run_id(run: Run) -> str:
    """The same for the same run folder, so that a resumed run continues its own charts."""
    digest = hashlib.sha256(str(Path(run.output_dir).resolve()).encode()).hexdigest()
    return f"{''.join(c if c.isalnum() else '-' for c in run.name)[:40]}-{digest[:8]}"


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
