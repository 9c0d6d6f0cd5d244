"""Files, tests, settings and links that pages, docstrings and comments name exist."""

from __future__ import annotations

import functools
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
    """`schedules.py` of Megatron-Core and the like are named with their package in the text around."""
    return bool(files_of_libraries(path))


@functools.cache
def files_of_libraries(path: str) -> list[Path]:
    """Those whose path ends so; megatron/core and torch may be left out."""
    import megatron.core
    import torch

    roots = [Path(megatron.core.__path__[0]), Path(torch.__path__[0]) / "distributed", Path(torch.__path__[0]) / "nn"]
    inside = re.sub(r"^(megatron/core|torch/(distributed|nn))/", "", path)
    return [file for root in roots for file in root.rglob(inside)]


NAMED = r"([\w./]+\.py),\s+(?:#\s+)?`([\w.]+)`"  # a name in a file: "optimizer.py, `ChainedOptimizer.step`"
OF_MISSING_PACKAGES = ("megablocks/",)  # they need a GPU


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".py", ".md")) and name != "CHANGELOG.md"])
def test_what_is_named_in_a_library_is_there(name: str) -> None:
    """In each version that this runs with. Line numbers would hold for one version alone."""
    text = (REPO / name).read_text()
    assert not re.search(r"\.py:\d+\b", text), "name the function, not the line"
    for path, word in re.findall(NAMED, text):
        if not path.startswith(OF_MISSING_PACKAGES):
            last = re.escape(word.rpartition(".")[2])
            defined = re.compile(rf"^\s*(?:def|class) {last}\b|^{last}\b.*=", re.M)
            where = [*files_of_libraries(path), *(REPO / file for file in FILES if file.endswith(path))]
            assert any(defined.search(file.read_text()) for file in where), f"{path}, {word}"


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
