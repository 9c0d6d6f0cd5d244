"""Ctrl-C while a command still imports its modules."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPO, environment

# Sends the signal when a module is about to be imported. Python imports this file at its start.
AT_AN_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (["-m", "jetmoe_megatron.cli", "--help"], "jetmoe_megatron.doctor"),
        (["pretrain_jetmoe.py", "--help"], "pydantic"),
    ],
)
def test_no_traceback(tmp_path: Path, arguments: list[str], module: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(AT_AN_IMPORT)
    variables = environment() | {"PYTHONPATH": f"{tmp_path}:{REPO}", "INTERRUPTED_AT": module}
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=REPO, env=variables, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")  # a shell's status 130
