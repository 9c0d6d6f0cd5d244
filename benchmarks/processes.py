"""Why a process of a benchmark ended."""

from __future__ import annotations

import re
import signal
import subprocess


def why_it_ended(ended: subprocess.CompletedProcess[str]) -> str:
    """The last line of its traceback, without what torch logs after that; or its signal."""
    if ended.returncode < 0:
        return f"died of {signal.Signals(-ended.returncode).name}"
    lines = [line for line in ended.stderr.splitlines() if line.strip() and not re.match(r"(\[rank\d+\]:)?\[W", line)]
    return re.sub(r"^\[rank\d+\]: ", "", lines[-1]) if lines else f"exited with status {ended.returncode}"
