"""What the Dockerfile runs is what the script takes. No image is built here."""

from __future__ import annotations

import re

import pytest

from tests.support import REPO, command

TEXT = (REPO / "Dockerfile").read_text()


@pytest.mark.parametrize("options", re.findall(r"OPTIONS=(--[a-z]+)", TEXT))
def test_its_command_is_known(options: str) -> None:
    (run,) = re.findall(r"^RUN bash (.+)$", TEXT, re.M)
    ended = command("bash", *run.replace("${OPTIONS}", options).split(), "--dry-run")
    assert ended.returncode == 0 and "pip install" in ended.stdout


def test_what_is_made_here_is_left_out() -> None:
    ignored = (REPO / ".dockerignore").read_text().split()
    assert {".git", ".venv", "data", "runs"} <= set(ignored)
