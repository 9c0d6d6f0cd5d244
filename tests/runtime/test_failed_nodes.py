"""Which nodes a start's folder names, and which are missing there."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetmoe_megatron.runtime import failed_nodes
from jetmoe_megatron.stopping import FAILED_NODES, NODE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FAILED_NODES, str(tmp_path / "failed_nodes"))
    return tmp_path / "failed_nodes"


def test_nodes_that_failed_and_nodes_that_did_not_come(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node in ("n1", "n2"):
        monkeypatch.setenv(NODE, node)
        failed_nodes.came()
    failed_nodes.record("n2", "rank 3 was killed")
    failed_nodes.record("n2", "rank 4 was killed")  # later
    nodes = ["n1", "n2", "n3"]
    assert failed_nodes.recorded(folder, nodes) == {"n2": "rank 3 was killed", "n3": "it did not start the ranks"}
    assert failed_nodes.recorded(folder, []) == {"n2": "rank 3 was killed"}
    assert sorted(path.name for path in folder.iterdir()) == ["n2"]


def test_if_no_node_came_it_is_not_their_fault(folder: Path) -> None:
    assert failed_nodes.recorded(folder, ["n1", "n2"]) == {}


def test_outside_a_job_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FAILED_NODES, raising=False)
    failed_nodes.came()
    failed_nodes.record("n1", "")
