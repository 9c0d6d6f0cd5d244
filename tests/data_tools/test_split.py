"""Held-out sets: documents are chosen by their content only, and none is lost."""

import random
import resource
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from data_tools import indexed
from data_tools.indexed import write_index
from data_tools.split import split
from tests.data_tools.datasets import SENTENCES, Documents, by_hand, parse, random_documents

Tree = Callable[[Path], list[str]]
Command = Callable[..., tuple[int, str, str]]
REPOSITORY = Path(__file__).parents[2]
# Copies and documents without tokens among them.
DOCUMENTS = SENTENCES + random_documents(600, 3) + random_documents(600, 3)[:50] + SENTENCES


def held_out(document: list[list[int]], fraction: float, seed: int = 0) -> bool:
    """What the docstring of split.py promises, one document at a time."""
    ids = [i for sequence in document for i in sequence]
    digest = blake2b(struct.pack(f"<{len(ids)}I", *ids), digest_size=8, salt=struct.pack("<QQ", seed, 0)).digest()
    return struct.unpack("<Q", digest)[0] < fraction * 2**64


def sides(folder: Path, documents: Documents, fraction: float = 0.1, seed: int = 0, code: int = 8) -> list[Documents]:
    by_hand(folder / "in", documents, code)
    split(folder / "in", folder / "train", folder / "held", fraction, seed, overwrite=True)
    parsed = [parse(folder / name) for name in ("train", "held")]
    return [documents for documents in parsed if documents is not None]


@pytest.mark.parametrize(("seed", "code", "chunk"), [(0, 8, 1 << 20), (0, 4, 7), (5, 8, 100), (2**64 - 1, 5, 1)])
def test_every_document_is_on_the_side_its_hash_says(
    tmp_path: Path, seed: int, code: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    train, held = sides(tmp_path, DOCUMENTS, 0.1, seed, code)
    assert held == [document for document in DOCUMENTS if held_out(document, 0.1, seed)]
    assert train == [document for document in DOCUMENTS if not held_out(document, 0.1, seed)]
    assert 0 < len(held) < len(train)


def test_a_held_out_set_is_stable(tmp_path: Path) -> None:
    """Against documents that come and move; copies stay together; a smaller set is part of a larger one."""
    _, held = sides(tmp_path, DOCUMENTS)
    more = DOCUMENTS + random_documents(300, 4)
    random.Random(0).shuffle(more)
    train_of_more, held_of_more = sides(tmp_path, more)
    assert all(document in held_of_more for document in held)
    assert not any(document in train_of_more for document in held_of_more)
    _, fewer = sides(tmp_path, DOCUMENTS, 0.02)
    assert len(fewer) < len(held) and all(document in held for document in fewer)
    _, others = sides(tmp_path, DOCUMENTS, seed=1)
    assert others != held


def test_the_share_is_the_one_asked_for(tmp_path: Path) -> None:
    """Of 20000 short documents that differ in one id: 2000 within four standard deviations."""
    documents = [[[i % 200, i // 200, 2]] for i in range(20_000)]
    assert abs(len(sides(tmp_path, documents)[1]) - 2000) < 4 * (20_000 * 0.1 * 0.9) ** 0.5


def test_the_command_says_what_went_where(tmp_path: Path, command: Command) -> None:
    prefix = by_hand(tmp_path / "in", DOCUMENTS)
    outputs = ("--train", tmp_path / "train", "--held-out", tmp_path / "held")
    status, out, err = command("split", prefix, *outputs, "--fraction", "0.1", "--seed", "7")
    assert (status, err) == (0, "")
    for name, chosen in (("train", False), ("held", True)):
        expected = [document for document in DOCUMENTS if held_out(document, 0.1, 7) == chosen]
        tokens = sum(len(sequence) for document in expected for sequence in document)
        assert f"{tmp_path / name}: {len(expected)} documents, {tokens} tokens\n" in out


def test_refused_and_nothing_written(tmp_path: Path, command: Command, tree: Tree) -> None:
    prefix = by_hand(tmp_path / "in", SENTENCES)
    by_hand(tmp_path / "taken", SENTENCES)
    by_hand(tmp_path / "none", [])
    by_hand(tmp_path / "hollow", [[[]], [[]], [[], []]])
    half = by_hand(tmp_path / "half_hollow", [[[]], [[5, 2]]])
    by_hand(tmp_path / "damaged", SENTENCES)
    with open(tmp_path / "damaged.idx", "r+b") as stream:
        stream.seek(34)
        stream.write(b"\xff")
    before = tree(tmp_path)

    def refused(message: str, source: Path, fraction: str = "0.5", **options: str | Path) -> None:
        outputs = {"train": tmp_path / "train", "held_out": tmp_path / "held"} | options
        arguments = [part for name, value in outputs.items() for part in ("--" + name.replace("_", "-"), value)]
        status, out, err = command("split", source, "--fraction", fraction, *arguments)
        assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
        assert message in err
        assert tree(tmp_path) == before

    for fraction in ("0", "1", "-0.1", "nan", "inf"):
        refused(f"fraction is {float(fraction)}; it must lie between 0 and 1", prefix, fraction)
    for seed in ("-1", str(2**64)):
        refused(f"seed is {seed}; it must lie between", prefix, seed=seed)
    refused("none of 5 documents would be held out; raise --fraction", prefix, "1e-9")
    refused("all 5 documents would be held out; lower --fraction", prefix, "0.999999999")
    refused("none of 0 documents", tmp_path / "none")
    refused("3 documents would be held out", tmp_path / "hollow")
    for hollow_side, message in ((True, "none of 2 documents"), (False, "all 2 documents")):
        apart = (s for s in range(99) if held_out([[]], 0.5, s) == hollow_side != held_out([[5, 2]], 0.5, s))
        refused(message, half, seed=str(next(apart)))
    refused("in: both an input and the output", prefix, train=prefix)
    refused("in: both an input and the output", prefix, held_out=prefix)
    refused("taken.bin exists", prefix, held_out=tmp_path / "taken")
    refused("train: named for both sides", prefix, held_out=tmp_path / "train")
    refused("sequence lengths and byte offsets disagree", tmp_path / "damaged")
    refused("missing.idx: no such file", tmp_path / "missing")


@pytest.mark.parametrize("limit", [3000, 10_000])
@pytest.mark.parametrize(("fraction", "larger"), [("0.02", "train"), ("0.98", "held")])
def test_both_sides_appear_or_none(tmp_path: Path, tree: Tree, limit: int, fraction: str, larger: str) -> None:
    """The system refuses this process large files: one side fits, the other's ids or index do not."""
    prefix = by_hand(tmp_path / "in", [[[i, 2]] for i in range(1000)])
    before = tree(tmp_path)
    outputs: list[str | Path] = ["--train", tmp_path / "train", "--held-out", tmp_path / "held"]
    failed = subprocess.run(
        [sys.executable, "-m", "data_tools", "split", prefix, *outputs, "--fraction", fraction],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
    )
    assert (failed.returncode, failed.stdout) == (1, "")  # it may pass
    assert failed.stderr.startswith(f"error: cannot write {tmp_path / larger}.")
    assert failed.stderr.endswith(": File too large\n") and failed.stderr.count("\n") == 1
    assert tree(tmp_path) == before


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200,000 documents: 8 MB of ids, 4 MB of index."""
    monkeypatch.setattr(indexed, "_CHUNK", 1 << 12)
    ids = np.random.default_rng(0).integers(0, 30_000, 4_000_000, np.uint16)
    ids.tofile(tmp_path / "in.bin")
    with open(tmp_path / "in.idx", "wb") as stream:
        write_index(stream, np.dtype(np.uint16), np.full(200_000, 20, np.int32))
    del ids
    tracemalloc.start()
    try:
        split(tmp_path / "in", tmp_path / "train", tmp_path / "held", 0.01)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5e6
