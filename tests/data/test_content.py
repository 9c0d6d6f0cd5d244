"""A rebuilt data set is distinguished from the old one, and never read with an index of the old one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import write_index
from jetmoe_megatron.config import Run
from jetmoe_megatron.errors import UserError
from tests.support import small_run, write_dataset

DOCUMENTS = 1_000_000


def write(prefix: Path, lengths: np.ndarray, tokens: np.ndarray) -> str:
    tokens.astype(np.uint16).tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as stream:
        write_index(stream, np.dtype(np.uint16), lengths.astype(np.int32))
    return str(prefix)


def exchanged(array: np.ndarray, shard: int) -> np.ndarray:
    """With two neighbours of a thousand shards in the other order."""
    parts = np.split(array, 1000)
    parts[shard], parts[shard + 1] = parts[shard + 1], parts[shard]
    return np.concatenate(parts)


@pytest.mark.parametrize("shard", [0, 1, 313, 500, 777, 998])
def test_shards_joined_in_another_order(tmp_path: Path, shard: int) -> None:
    """Of equal lengths, so that the indices are the same; of other lengths over the same tokens."""
    from jetmoe_megatron.data.storage import content_key

    random = np.random.default_rng(shard)
    tokens = random.integers(0, 60_000, 20 * DOCUMENTS)
    equal = np.full(DOCUMENTS, 20)
    first = write(tmp_path / "first", equal, tokens)
    assert content_key(first, tmp_path) != content_key(
        write(tmp_path / "moved", equal, exchanged(tokens, shard)), tmp_path
    )
    uneven = equal + random.permutation(np.repeat((-9, 9), DOCUMENTS // 2))
    second = write(tmp_path / "second", uneven, tokens)
    assert content_key(second, tmp_path) != content_key(
        write(tmp_path / "cut", exchanged(uneven, shard), tokens), tmp_path
    )
    for suffix in (".bin", ".idx"):
        shutil.copyfile(first + suffix, f"{tmp_path}/copy{suffix}")
    assert content_key(first, tmp_path) == content_key(f"{tmp_path}/copy", tmp_path)


def test_what_no_key_shows_is_seen_when_it_is_read(
    tmp_path: Path, world_of_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jetmoe_megatron.data import sequences
    from jetmoe_megatron.data.index_cache import IndexCache

    monkeypatch.setattr(sequences, "content_key", lambda path, folder: "the same")
    path, cache = write_dataset(tmp_path / "code", 60, 0), IndexCache(tmp_path / "cache")
    run = Run.model_validate(small_run(tmp_path, {"code": path, "prose": path}))
    before = sequences.Sequences(path, run, cache, run.seed)
    before.build(0)
    lengths, tokens = np.array(before.indexed.sequence_lengths), np.fromfile(f"{path}.bin", np.uint16)
    write(tmp_path / "code", lengths[::-1], tokens)
    again = sequences.Sequences(path, run, cache, run.seed)
    refused = 0
    for number in range(again.per_epoch):
        try:
            assert len(again[number]["tokens"]) == 32
        except UserError as error:
            refused += 1
            assert "is not the file that its order was built for" in str(error) and str(cache.root) in str(error)
    assert refused > again.per_epoch / 4  # a place that fits by chance cannot be told
