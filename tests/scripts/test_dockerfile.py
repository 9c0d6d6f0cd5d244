"""What the Dockerfile and the definition for apptainer run is what the script takes. No image is built here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPO, command

DOCKERFILE, DEFINITION = ((REPO / "docker" / name).read_text() for name in ("Dockerfile", "jetmoe.def"))
(RUN,) = re.findall(r"^RUN bash (.+)$", DOCKERFILE, re.M)
COPIED = dict(re.findall(r"^    (\S+) (/opt/jetmoe-megatron/\S+)$", DEFINITION, re.M))


@pytest.mark.parametrize("options", re.findall(r"OPTIONS=(--[a-z]+)", DOCKERFILE))
def test_its_command_is_known(options: str) -> None:
    ended = command("bash", *RUN.replace("${OPTIONS}", options).split(), "--dry-run")
    assert ended.returncode == 0 and "pip install" in ended.stdout


def test_what_is_made_here_is_left_out() -> None:
    ignored = (REPO / ".dockerignore").read_text().split()
    assert {".git", ".venv", "data", "runs"} <= set(ignored)


def test_the_base_is_pinned() -> None:
    """By default, and to what docs/install.md tried the script beside."""
    (base,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.M)
    name, _, release = base.removesuffix("-py3").rpartition(":")
    assert name and re.fullmatch(r"\d\d\.\d\d", release)
    assert f".nv{release}" in (REPO / "docs/install.md").read_text()


def test_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "install the extra `dev`"
    checked = subprocess.run([hadolint, REPO / "docker/Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_apptainer_does_the_same() -> None:
    assert f"bash {RUN.replace('${OPTIONS}', '{{ OPTIONS }}')}\n" in DEFINITION
    for name in ("BASE", "OPTIONS", "TORCH_CUDA_ARCH_LIST"):
        assert re.findall(rf"{name}=(\S+)$", DOCKERFILE, re.M) == re.findall(rf"{name}=(\S+)$", DEFINITION, re.M)


def test_apptainer_copies_what_the_script_reads(tmp_path: Path) -> None:
    """All of the package, and what `scripts/install_gpu.sh` and setup.py open."""
    assert COPIED and all(target == f"/opt/jetmoe-megatron/{source}" for source, target in COPIED.items())
    for source in COPIED:
        path = REPO / source
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / source)
    ended = command("bash", *RUN.replace("${OPTIONS}", "--all").split(), "--dry-run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    described = command(sys.executable, "setup.py", "--version", cwd=tmp_path)
    assert described.returncode == 0, described.stderr
