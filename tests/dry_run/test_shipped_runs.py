"""The run files that are shipped, with small data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import IndexedWriter
from data_tools.tokenizer import train_bpe
from tests.support import REPO, environment
from tests.warm import Command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all paths of the run files lead: $DATA, and the working folder."""
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "texts.jsonl").write_text(json.dumps({"text": "the quick brown fox"}) + "\n")
    texts = "".join(file.read_text() for file in (REPO / "configs").rglob("*.yaml"))
    for name in set(re.findall(r"tokenizer: (?:\$\{DATA\}/)?([\w/]+)", texts)):
        train_bpe([folder / "texts.jsonl"], 270, folder / name)
    random = np.random.default_rng(0)
    for name in set(re.findall(r"path: \"?(?:\$\{DATA\}/)?([\w./-]+)", texts)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with IndexedWriter(folder / name, np.uint16) as writer:
            for _ in range(100):
                writer.add_document(random.integers(0, 259, 10_000).astype(np.uint16))
    return folder


# The published run reads more than the indices that a start builds by itself.
FEW = ["phases.0.tokens=8388608", "phases.1.tokens=8388608", "schedule.warmup_tokens=4194304"]
HERE: tuple[list[str], str] = [], r"memory: fits: the rank needs \S+ MB of \S+ GB \(available here\)"
ON_96 = (
    ["--world", "96", "--hardware", "h100", *FEW],
    r"memory: fits: the fullest rank \(0 of 96\) needs \S+ GB of 80 GB \(H100 SXM\)",
)
SHIPPED: dict[str, tuple[list[str], str]] = {
    "quickstart/run.yaml": HERE,
    "my_run.yaml": HERE,
    "jetmoe_8b/run.yaml": ON_96,
    "jetmoe_8b/run_planned.yaml": ON_96,
}


@pytest.mark.parametrize("file", SHIPPED)
def test_a_shipped_run(file: str, folder: Path) -> None:
    arguments, said = SHIPPED[file]
    before = sorted(folder.rglob("*"))
    env = {**environment(), "DATA": str(folder), "OUTPUT": str(folder / "runs"), "COLUMNS": "80"}
    line = ["pretrain", REPO / "configs" / file, "--dry-run", *arguments]
    result = Command(line, env, folder).run()
    assert result.returncode == 0, result.stderr
    assert re.search(f"^{said}", result.stdout, re.MULTILINE), result.stdout
    for title in ("| phase ", "| data set ", "| when most is held "):
        assert f"\n{title}" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if line.startswith("|"))
    assert sorted(folder.rglob("*")) == before


def test_every_shipped_run_is_here() -> None:
    runs = {file for file in (REPO / "configs").rglob("*.yaml") if "\noutput_dir:" in file.read_text()}
    assert runs == {REPO / "configs" / file for file in SHIPPED}


def test_the_published_run_without_its_indices(folder: Path) -> None:
    env = {**environment(), "DATA": str(folder), "OUTPUT": str(folder / "runs")}
    few = ["phases.0.tokens=8e9", "phases.1.tokens=22e9", "schedule.warmup_tokens=8e9"]
    line = ["pretrain", REPO / "configs/jetmoe_8b/run.yaml", "--dry-run", "--world", "96", *few]
    result = Command(line, env, folder).run()
    assert result.returncode == 2
    assert result.stderr.startswith("error: data.build_limit_tokens: the indices of ")
    assert result.stderr.count("\n") == 1
