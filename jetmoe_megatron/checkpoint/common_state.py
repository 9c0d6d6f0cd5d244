"""`common.pt`: the plain values of a checkpoint. There is one: the number of the optimizer's steps.

Rank 0 writes it, and reading it runs no code: torch.load unpickles where a container sets
TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from jetmoe_megatron.runtime.plain_pickle import read_pickle

COMMON = "common.pt"
_OPTIMIZER_STEPS = "optimizer_steps"
_MOST = 2**16  # bytes of the values
_MOST_FILE = 2**24  # bytes; ours has about 1300


def write_common(folder: Path, optimizer_steps: int | None) -> None:
    """optimizer_steps: None in a checkpoint of weights only.

    Raises OSError, where torch.save would raise a RuntimeError without the reason.
    """
    content = io.BytesIO()
    torch.save({} if optimizer_steps is None else {_OPTIMIZER_STEPS: optimizer_steps}, content)
    (folder / COMMON).write_bytes(content.getvalue())


def read_optimizer_steps(folder: Path) -> int | None:
    """None if the checkpoint has only weights. Other values in the file are ignored.

    Raises:
        ValueError: the file does not hold a number of steps; the message is a short reason.
        OSError: it cannot be read.
    """
    common = _values(folder / COMMON)
    if common == {}:
        return None
    steps = common.get(_OPTIMIZER_STEPS) if isinstance(common, dict) else None
    if type(steps) is not int or not 0 <= steps < 2**53:
        raise ValueError(f"{COMMON} has no number of optimizer steps")
    return steps


def _values(file: Path) -> Any:
    """The values that torch.save has written: a zip file with one small pickle. Its other entries belong to tensors."""
    with open(file, "rb") as stream:
        whole = io.BytesIO(stream.read(_MOST_FILE))
    try:
        with zipfile.ZipFile(whole) as archive:
            (pickled,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            if pickled.file_size > _MOST or pickled.compress_type != zipfile.ZIP_STORED:
                raise ValueError("more than a few values")
            content = archive.read(pickled)
    except Exception as error:  # zipfile raises many kinds
        raise ValueError(f"{COMMON} cannot be read: {str(error) or type(error).__name__}") from None
    return read_pickle(content, COMMON, known={})
