"""Files, tests, settings and links that pages, docstrings and comments name exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from jetmoe_megatron.config import Run
from tests.support import REPO, command

FILES = command("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.splitlines()
PAGES = [name for name in FILES if name.endswith(".md") and name != "CHANGELOG.md"]  # that tells what was, too
SOURCES = [
    name for name in FILES if name.endswith((".py", ".sh", ".sbatch", ".yaml")) and not name.startswith("tests/")
]
# Of a run, of a user, of Megatron-LM, and what the recipes add.
OF_OTHERS = {
    *re.findall(r"^\*\*`(\S+)`\*\*, a new file", (REPO / "docs/extending.md").read_text(), re.M),
    "run.yaml",
    "config.yaml",
    "model.yaml",
    "RUN.yaml",
    "my/run.yaml",
    "README.txt",
    "tools/preprocess_data.py",
}


def quoted(name: str) -> Iterator[str]:
    """What stands in backticks on a line, outside of blocks of commands."""
    text = re.sub(r"^```.*?^```", "", (REPO / name).read_text(), flags=re.M | re.S)
    yield from re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("name", [*PAGES, *SOURCES])
def test_named_files_are_there(name: str) -> None:
    for word in quoted(name):
        path = word.partition(" ")[0].partition("::")[0]
        if re.fullmatch(r"[\w./-]+\.(py|sh|md|sbatch|toml|yaml)", path) and path not in OF_OTHERS:
            assert any(file == path or file.endswith(f"/{path}") for file in FILES) or of_a_library(path), word


def of_a_library(path: str) -> bool:
    """`schedules.py:996` of Megatron-Core and the like are named with their package in the text around."""
    import megatron.core
    import torch

    roots = [Path(megatron.core.__path__[0]), Path(torch.__path__[0]) / "distributed", Path(torch.__path__[0]) / "nn"]
    return any(next(root.rglob(path), None) for root in roots)


@pytest.mark.parametrize("name", PAGES)
def test_named_tests_are_there(name: str) -> None:
    for word in quoted(name):
        if test := re.fullmatch(r"(?:(tests/\S+\.py)::)?(test_\w+)", word):
            where = [test[1]] if test[1] else [file for file in FILES if file.startswith("tests/")]
            assert any(f"def {test[2]}(" in (REPO / file).read_text() for file in where if file.endswith(".py")), word


@pytest.mark.parametrize("name", [*PAGES, *SOURCES])
def test_named_settings_are_there(name: str) -> None:
    for word in quoted(name):
        if match := re.fullmatch(r"(\w+)\.(?!(?:py|yaml|safetensors)$)(\w+)(=\S+|: .+)?", word):
            section, key = match[1], match[2]
            model = Run.model_fields[section].annotation if section in Run.model_fields else None
            if isinstance(model, type) and issubclass(model, BaseModel):
                assert key in model.model_fields, word


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for text, target in re.findall(r"\[([^\]\n]+)\]\(([^)\s]+)\)", (REPO / name).read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (REPO / name).parent / file if file else REPO / name
        assert path.exists(), f"[{text}]({target})"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
