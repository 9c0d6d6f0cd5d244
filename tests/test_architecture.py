"""Packages import one way (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.support import REPO, command

ARCHITECTURE = REPO / "docs/architecture.md"
ROOT = REPO / "jetmoe_megatron"
FOR_ALL = {"errors", "stopping", "data_tools"}
# What else of ours each package may import, besides itself.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "runtime": set(),
    "model": {"config", "runtime"},
    "page": set(),
    "data": {"config", "page"},
    "checkpoint": {"config", "runtime"},
    "resume": {"config", "runtime", "data", "checkpoint"},
    "convert": {"config", "runtime", "checkpoint"},
    "monitor": {"config", "checkpoint"},
    "launch": {"config", "runtime", "checkpoint", "monitor"},
    "report": {"config", "runtime", "checkpoint", "monitor", "launch", "page"},
    "watch": {"config", "checkpoint", "monitor", "launch", "report"},
    "training": {"config", "runtime", "model", "data", "checkpoint", "resume", "convert", "monitor", "report"},
    "doctor": {"config", "runtime", "model", "training", "launch"},
    "plan": {"config", "runtime", "model", "data", "checkpoint", "training", "page"},
    "dry_run": {
        "config",
        "runtime",
        "data",
        "checkpoint",
        "resume",
        "convert",
        "monitor",
        "training",
        "plan",
    },
    "cli": {"config", "data", "checkpoint", "resume", "convert", "launch", "report", "watch", "doctor", "plan"},
}


def modules_imported(path: Path) -> set[str]:
    """Full names of ours, wherever in the file they are imported; `from a import b` gives a.b where that is a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {name for name in below if file_of(name)}
            found |= files or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("jetmoe_megatron", "data_tools")}


def file_of(module: str) -> Path | None:
    path = REPO.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imports(path: Path) -> set[str]:
    """The packages of ours that a file imports."""
    names = [name.split(".") for name in modules_imported(path)]
    return {
        "data_tools" if first == "data_tools" else rest[0]
        for first, *rest in names
        if rest or first != "jetmoe_megatron"
    }


def files_of(package: str) -> list[Path]:
    return [ROOT / "cli.py"] if package == "cli" else sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package: str) -> None:
    for file in files_of(package):
        assert imports(file) - {package} - FOR_ALL <= ALLOWED[package], file


@pytest.mark.parametrize("package", ALLOWED)
def test_no_rule_allows_more_than_is_used(package: str) -> None:
    assert {name for file in files_of(package) for name in imports(file)} - {package} - FOR_ALL == ALLOWED[package]


def test_what_all_may_import_needs_nothing_above_it() -> None:
    assert imports(ROOT / "errors.py") == {"data_tools"} and not imports(ROOT / "stopping.py")


def test_no_circle_of_files() -> None:
    """Wherever in a file the import stands. A package's `__init__` may be imported by what it names."""
    files = [path for root in (ROOT, REPO / "data_tools") for path in root.rglob("*.py") if path.name != "__init__.py"]
    below = {file: {file_of(name) for name in modules_imported(file)} & set(files) for file in files}
    while leaves := [file for file, others in below.items() if not others & below.keys()]:
        for file in leaves:
            del below[file]
    assert not below, f"in circles, or above one: {sorted(str(file.relative_to(REPO)) for file in below)}"


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
