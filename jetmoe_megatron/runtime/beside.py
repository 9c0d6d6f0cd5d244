"""A module of ours in a process of its own, beside the training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from jetmoe_megatron.stopping import STOP_SIGNALS

# It ignores the signals that stop a run, because a batch system sends them to every process of the job.
_NAMES = " ".join(number.name.removeprefix("SIG") for number in STOP_SIGNALS)
_UNSTOPPED = ["/bin/sh", "-c", f'trap "" {_NAMES}; exec "$@"', "sh"]
_ROOT = Path(__file__).parents[2]  # the folder of the package, also if it is not installed


def start_beside(module: str, *arguments: object) -> subprocess.Popen[bytes]:
    """`python -m MODULE ARGUMENTS`, without a GPU. Raises OSError if no process can be started."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [*_UNSTOPPED, sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, **alone}, start_new_session=True)
