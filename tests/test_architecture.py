"""Packages import one way (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.support import REPO, command

ARCHITECTURE = REPO / "docs/architecture.md"
# What each package may import of ours. A package may always import itself, and `errors`.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "platform": set(),
    "model": {"config", "platform"},
    "data": {"config", "data_tools"},
    "checkpoint": {"config", "platform"},
    "convert": {"config", "checkpoint", "data_tools"},
    "monitor": {"config", "checkpoint", "data_tools"},
    "launch": set(),
    "training": {"config", "platform", "model", "data", "checkpoint", "convert", "monitor", "data_tools"},
    "cli": {"convert", "checkpoint", "monitor", "config", "data", "training", "data_tools"},
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            first, *rest = name.split(".")
            if first == "data_tools":
                found.add("data_tools")
            elif first == "jetmoe_megatron" and rest:
                found.add(rest[0])
    return found - {"errors"}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package: str) -> None:
    root = REPO / "jetmoe_megatron"
    files = [root / "cli.py"] if package == "cli" else sorted((root / package).rglob("*.py"))
    for file in files:
        assert imports(file) - {package} <= ALLOWED[package], file


@pytest.mark.parametrize("package", ALLOWED)
def test_no_rule_allows_more_than_is_used(package: str) -> None:
    root = REPO / "jetmoe_megatron"
    files = [root / "cli.py"] if package == "cli" else sorted((root / package).rglob("*.py"))
    assert {name for file in files for name in imports(file)} - {package} == ALLOWED[package]


def test_the_page_tells_the_rules() -> None:
    table = re.findall(r"^\| `(?:jetmoe_megatron/)?(\w+)(?:/|\.py)` \| .* \| (.*) \|$", ARCHITECTURE.read_text(), re.M)
    told = {name: set() if rule == "nothing of ours" else set(rule.split(", ")) for name, rule in table}
    assert told == {**ALLOWED, "data_tools": set()}


def test_every_package_has_its_rule() -> None:
    packages = {p.name for p in (REPO / "jetmoe_megatron").iterdir() if (p / "__init__.py").exists()}
    assert packages | {"cli"} == ALLOWED.keys()


def test_data_tools_stand_alone() -> None:
    for file in (REPO / "data_tools").rglob("*.py"):
        assert imports(file) <= {"data_tools"}, file
        assert "torch" not in {name.name for name in _plain_imports(file)}, file


def test_config_needs_no_torch() -> None:
    for file in [*(REPO / "jetmoe_megatron/config").rglob("*.py"), REPO / "jetmoe_megatron/data/checks.py"]:
        assert not {n.name.split(".")[0] for n in _plain_imports(file)} & {"torch", "megatron", "transformers"}, file


def test_training_needs_no_package_of_the_text_tools() -> None:
    """On a GPU machine without a network what is needed has to be carried there."""
    packages = [
        "orjson",
        "zstandard",
        "pyarrow",
        "tokenizers",
        "sentencepiece",
        "fastokens",
        "transformers",
        "safetensors",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({packages})); import pretrain_jetmoe, tests.gpu.test_train;"
    code += "import jetmoe_megatron.training.preflight, jetmoe_megatron.training.loop"
    result = command(sys.executable, "-c", code, timeout=120)
    assert result.returncode == 0, result.stderr


def _plain_imports(path: Path) -> list[ast.alias]:
    """`import x` and `from x import y`, the latter as x."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += node.names
        elif isinstance(node, ast.ImportFrom):
            found.append(ast.alias(node.module or ""))
    return found
