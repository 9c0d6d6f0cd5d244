"""bash and shellcheck find nothing wrong with the scripts."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support import REPO, command

SCRIPTS = sorted(path for path in (REPO / "scripts").rglob("*") if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_sound(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "install the extra `dev`"
    for checker in (["bash", "-n"], [shellcheck]):
        checked = command(*checker, script)
        assert checked.returncode == 0, checked.stdout + checked.stderr
