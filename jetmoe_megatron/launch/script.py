"""Runs a script, or a module, as `python` does."""

from __future__ import annotations

import os
import runpy
import sys


def run_script() -> None:
    """The arguments of the process: a script, or `-m` and a module, and its arguments."""
    sys.argv.pop(0)
    if sys.argv[0] == "-m":
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
