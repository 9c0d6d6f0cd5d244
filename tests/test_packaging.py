"""One version number everywhere, and workflows that run this repository's own CI commands."""

from __future__ import annotations

import importlib.metadata

import yaml

import jetmoe_megatron
from tests.support import REPO, jetmoe


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


def test_other_files_are_yaml() -> None:
    files = [*(REPO / ".github").rglob("*.yml"), REPO / ".pre-commit-config.yaml", REPO / "CITATION.cff"]
    assert len(files) >= 6 and all(yaml.safe_load(file.read_text()) for file in files)
