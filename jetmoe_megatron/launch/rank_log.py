"""A log of each rank: what it prints goes to a file too."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from jetmoe_megatron.stopping import RANK_LOGS


def log_into_file() -> None:
    """From now on stdout and stderr of this process go to `rank_N.log` too, if the job's script names a folder.

    A process of its own copies them, so that also the last words of a crash in C++ are kept.
    """
    if folder := os.environ.get(RANK_LOGS):
        file = Path(folder) / f"rank_{os.environ['RANK']}.log"
        for descriptor in (1, 2):
            # -i, and a session of its own: it ends after this process, whatever signals come.
            tee = subprocess.Popen(
                ["tee", "-i", "-a", file], stdin=subprocess.PIPE, stdout=descriptor, start_new_session=True
            )
            assert tee.stdin
            os.dup2(tee.stdin.fileno(), descriptor)
            tee.stdin.close()
            tee.returncode = 0  # never waited for
