"""A doctor of which one rank is slow, different or broken: patched in here, in that rank's process.

python -m tests.doctor.faults FAULT[,FAULT] RANK <the arguments of `python -m jetmoe_megatron.doctor`>
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch


def slowed(module: Any, name: str, seconds: float = 0.3) -> None:
    original = getattr(module, name)

    @wraps(original)
    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments, **named)

    patch.object(module, name, slow).start()


def slow_matmul() -> None:
    import torch

    slowed(torch, "mm")


def slow_all_reduce() -> None:
    import torch

    slowed(torch.distributed, "all_reduce")


def slow_pairs() -> None:
    import torch

    slowed(torch.distributed, "batch_isend_irecv")


def wrong_clock() -> None:
    from jetmoe_megatron.doctor import clocks

    patch.object(clocks, "_now", lambda: time.time() + 60).start()


def other_code() -> None:
    from jetmoe_megatron.doctor import examination

    patch.object(examination, "code_digest", lambda: "0" * 64).start()


def promised_gpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"


def full_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))


def failing_matmul() -> None:
    import torch

    def fail(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nand more")

    patch.object(torch, "mm", fail).start()


def hanging(begun: Path) -> None:
    import torch

    patch.object(torch, "mm", lambda *a: (begun.touch(), time.sleep(3600))).start()


def other_version(packages: Path | None = None) -> None:
    packages = packages or Path(tempfile.mkdtemp())
    record = packages / "megatron_core-9.8.7.dist-info" / "METADATA"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 9.8.7\n")
    sys.path.insert(0, str(packages))


def on_rank(rank: int, fault: Callable[..., None], *arguments: Any) -> None:
    """Outside SLURM, each rank is on a node of its own, whose name ends in its number."""
    own = os.environ["RANK"]
    os.environ.setdefault("SLURMD_NODENAME", f"node{own}")
    if own == str(rank):
        fault(*arguments)


if __name__ == "__main__":
    from jetmoe_megatron.doctor.__main__ import main

    names, number = sys.argv[1], sys.argv[2]
    del sys.argv[1:3]
    for name in names.split(","):
        on_rank(int(number), globals()[name])
    sys.exit(main())
