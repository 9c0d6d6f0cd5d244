"""One version number everywhere, and workflows that run this repository's own CI commands."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import yaml
from packaging.requirements import Requirement

import jetmoe_megatron
from tests.support import REPO, command, jetmoe


def test_one_version() -> None:
    version = jetmoe_megatron.__version__
    assert importlib.metadata.version("jetmoe-megatron") == version
    assert yaml.safe_load((REPO / "CITATION.cff").read_text())["version"] == version
    assert jetmoe("--version").stdout == f"jetmoe {version}\n"


def test_workflows_call_ours() -> None:
    called = {}
    for file in (REPO / ".github/workflows").glob("*.yml"):
        (job,) = yaml.safe_load(file.read_text())["jobs"].values()
        called[file.stem] = [step["run"] for step in job["steps"] if "run" in step]
    assert called == {"ci": [".ci/run"], "nightly": ["make test-all CONSTRAINTS="]}


def test_a_newer_python_is_found_or_asked_for() -> None:
    """By `make test-stack`. A Python that is named is the one, or an error."""
    script = REPO / "scripts/newer_python.sh"
    named = command("env", "PYTHON312=/no/such/python", "bash", script)
    assert named.returncode == 2 and named.stdout == ""
    assert named.stderr == (
        "error: no Python 3.12 or 3.13 runs here (tried /no/such/python): set PYTHON312 to the path of one\n"
    )
    if (found := command("bash", script)).returncode == 0:
        version = command(found.stdout.strip(), "-c", "import sys; print(sys.version_info[:2])").stdout.strip()
        assert version in ("(3, 12)", "(3, 13)")


def test_test_stack_runs_files_that_are_there() -> None:
    text = (REPO / "Makefile").read_text().replace("\\\n", " ")
    (files,) = re.findall(r"^STACK_TESTS := (.+)$", text, re.M)
    assert len(files.split()) >= 5 and all((REPO / name).exists() for name in files.split())


def test_each_python_has_its_megatron() -> None:
    """The classifiers, the pins by Python and the nightly workflow name the same versions."""
    text = (REPO / "setup.py").read_text()
    pythons = re.findall(r"Python :: (3\.\d+)", text)
    assert pythons == ["3.10", "3.11", "3.12", "3.13"] and 'python_requires=">=3.10,<3.14"' in text
    pins = [Requirement(pin) for pin in re.findall(r'"(megatron-core==[^"]+)"', text)]
    for python in pythons:
        assert sum(pin.marker.evaluate({"python_version": python}) for pin in pins if pin.marker) == 1
    nightly = yaml.safe_load((REPO / ".github/workflows/nightly.yml").read_text())
    assert nightly["jobs"]["run"]["strategy"]["matrix"]["python"] == pythons[1:]


def test_other_files_are_yaml() -> None:
    files = [*(REPO / ".github").rglob("*.yml"), REPO / ".pre-commit-config.yaml", REPO / "CITATION.cff"]
    assert len(files) >= 6 and all(yaml.safe_load(file.read_text()) for file in files)


def test_all_that_is_imported_is_declared() -> None:
    """In setup.py, or installed by scripts/install_gpu.sh, or told of in docs/install.md."""
    declared = {Requirement(text).name.lower() for text in re.findall(r'^ +"([\w.-]+[^"]*)"', _requirements(), re.M)}
    declared.add("pydantic-core")  # a part of pydantic, which pins it
    by_hand = {"amp_c", "deep_ep", "grouped_gemm", "megablocks", "megablocks_ops", "stk"}
    packages = importlib.metadata.packages_distributions()
    missing = {}
    for file in [*(REPO / "jetmoe_megatron").rglob("*.py"), *(REPO / "data_tools").rglob("*.py")]:
        for name in _imported(file) - sys.stdlib_module_names - {"jetmoe_megatron", "data_tools"} - by_hand:
            if not {own.lower().replace("_", "-") for own in packages.get(name, [name])} & declared:
                missing[name] = str(file.relative_to(REPO))
    assert missing == {}


def _requirements() -> str:
    (text,) = re.findall(r"install_requires=.*entry_points", (REPO / "setup.py").read_text(), re.S)
    return text


def _imported(file: Path) -> set[str]:
    """The first parts of what is imported anywhere in the file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}
