"""torch's record of the last collectives of a rank, written into the run folder when a rank fails.

The launcher says from these dumps which rank did not come to which collective (`launch/missing_ranks.py`). NCCL writes
dumps itself when a collective exceeds its time limit. Over gloo, the rank writes one when it fails.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from jetmoe_megatron.runtime.plain_pickle import read_pickle
from jetmoe_megatron.stopping import DUMPS, LAUNCHER_FOLDER

_NCCL_FILE = "TORCH_FR_DUMP_TEMP_FILE"  # the watchdog adds the rank
_ENTRIES = 2000  # collectives of all groups that are remembered; torch's default for NCCL


def record_into(folder: Path) -> Path:
    """Before the ranks join a process group. Returns the folder for the dumps of this start, inside `folder`."""
    start = [os.environ.get("TORCHELASTIC_RUN_ID", "none"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")]
    dumps = folder / "-".join([*start, os.environ.get("MASTER_PORT", "0")]).replace("/", "-")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_ENTRIES))
    os.environ[_NCCL_FILE] = f"{dumps.absolute()}/nccl_"
    if (launcher := os.environ.get(LAUNCHER_FOLDER)) and os.environ.get("RANK") == "0":
        with suppress(OSError):  # they are read only
            for left in dumps.glob("*_*"):  # by an earlier start with the same name
                left.unlink()
        (Path(launcher) / DUMPS).write_text(str(dumps.resolve()))
    return dumps


def make_folder() -> None:
    """When the run folder belongs to this run: NCCL's watchdog does not make it."""
    if torch.cuda.is_available():
        Path(os.environ[_NCCL_FILE]).parent.mkdir(parents=True, exist_ok=True)


def write_dump(dumps: Path) -> None:
    """What this rank has done over gloo. None if the disk refuses it: the run has failed for another reason."""
    run_folder = dumps.parents[2]
    if torch.cuda.is_available() or not torch.distributed.is_initialized() or not run_folder.exists():
        return
    recorder: Any = torch._C._distributed_c10d
    dump = read_pickle(recorder._dump_fr_trace(), "a dump", {})
    dump["pg_config"] = {  # gloo does not fill it
        group.group_name: {
            "name": group.group_name,
            "desc": group.group_desc,
            "ranks": str(torch.distributed.get_process_group_ranks(group)),
        }
        for group in distributed_c10d._world.pg_map
    }
    with suppress(OSError):
        dumps.mkdir(parents=True, exist_ok=True)
        (dumps / f"gloo_{torch.distributed.get_rank()}").write_text(json.dumps(dump))


def remove_empty(dumps: Path) -> None:
    """After a run without a failure."""
    with suppress(OSError):
        dumps.rmdir()
        dumps.parent.rmdir()
        dumps.parent.parent.rmdir()
