"""`common.pt`: the plain values of a checkpoint. There is one: the number of the optimizer's steps.

Megatron writes the file on rank 0 in the middle of a save, where an error would leave the other ranks waiting. It reads
the file as torch.load does by default, and an environment variable that some containers set
(TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD) turns that into unpickling. Here rank 0 writes it first, and reading it runs no code.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
from megatron.core.dist_checkpointing.strategies.common import (
    COMMON_STATE_FNAME,
    TorchCommonLoadStrategy,
    TorchCommonSaveStrategy,
)

from jetmoe_megatron.checkpoint.plain_pickle import read_pickle

OPTIMIZER_STEPS = "optimizer_steps"
_MOST = 2**16  # bytes


def write_common(folder: Path, optimizer_steps: int) -> None:
    """Raises OSError, where torch.save would raise a RuntimeError without the reason."""
    content = io.BytesIO()
    torch.save({OPTIMIZER_STEPS: optimizer_steps}, content)
    (folder / COMMON_STATE_FNAME).write_bytes(content.getvalue())


def leave_common_to_us() -> None:
    """From now on, Megatron's saves write no `common.pt`."""
    register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _SavesNothing("torch", 1))


class LoadsSteps(TorchCommonLoadStrategy):
    """For megatron.core.dist_checkpointing.load, which adds the result to the tensors."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, int]:
        """`optimizer_steps`, or nothing if a checkpoint has only weights. Other values in the file are ignored.

        Raises:
            ValueError: `optimizer_steps` is not a number of steps.
        """
        common = _values(Path(checkpoint_dir) / COMMON_STATE_FNAME)
        if common == {}:
            return {}
        steps = common.get(OPTIMIZER_STEPS) if isinstance(common, dict) else None
        if type(steps) is not int or not 0 <= steps < 2**53:
            raise ValueError(f"{COMMON_STATE_FNAME} has no number of optimizer steps")
        return {OPTIMIZER_STEPS: steps}


def _values(file: Path) -> Any:
    """The values that torch.save has written: a zip file with one small pickle. Its other entries belong to tensors."""
    try:
        with zipfile.ZipFile(file) as archive:
            (pickled,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            if pickled.file_size > _MOST or pickled.compress_type != zipfile.ZIP_STORED:
                raise ValueError("more than a few values")
            content = archive.read(pickled)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"{COMMON_STATE_FNAME} cannot be read: {error}") from None
    return read_pickle(content, COMMON_STATE_FNAME, known={})


class _SavesNothing(TorchCommonSaveStrategy):
    def save_common(self, common_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        pass
