"""Each message that docs/troubleshooting.md explains is one that the code prints."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support import REPO

PAGE = (REPO / "docs/troubleshooting.md").read_text().partition("\n## On GPUs\n")[0]
MESSAGES = [
    message
    for row in re.findall(r"^\| (`.+?) \| ", PAGE, re.M)
    for message in re.findall(r"`([^`]+)`", row)
]  # fmt: skip


def texts() -> str:
    """All texts of the code, with `...` for what is put into them, and of the scripts that it renders."""
    found = []
    for package in ("jetmoe_megatron", "data_tools"):
        for file in (REPO / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                    found.append("".join(map(str, parts)))
    found += [file.read_text() for file in (REPO / "jetmoe_megatron/launch/templates").glob("*.sh")]
    return "\n".join(found)


TEXTS = texts()


def test_there_are_some() -> None:
    assert len(MESSAGES) > 20


@pytest.mark.parametrize("message", MESSAGES)
def test_it_is_printed(message: str) -> None:
    for part in filter(None, (part.strip(" :;,.(") for part in message.split("..."))):
        assert part in TEXTS
