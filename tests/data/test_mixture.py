"""The samples of a run: shares, order, the continuation across phases, and the count of tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.data.step_batches import micro_batches_of_step
from jetmoe_megatron.errors import UserError
from tests.support import VOCAB, small_run, write_dataset


def run_samples(tmp_path: Path, data: dict[str, str], **changes: object) -> tuple[Run, Any]:
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import RunSamples

    run = Run.model_validate(small_run(tmp_path, data, **changes))
    return run, RunSamples(run, IndexCache(tmp_path / "cache"))


def tokens_between(samples: Any, first: int, last: int) -> dict[str, int]:
    from jetmoe_megatron.data.mixture import Position

    sequences = samples.advance(Position(first), last - first).sequences
    return {name: count * 32 for name, count in sequences.items()}


def test_shares_and_phase_switch(tmp_path: Path, data: dict, world_of_one: None) -> None:
    _, samples = run_samples(tmp_path, data, phases__0__tokens=100 * 256, phases__1__tokens=50 * 256)
    assert len(samples) == 150 * 8
    assert tokens_between(samples, 0, 800) == {"code": 600 * 32, "prose": 200 * 32}
    assert tokens_between(samples, 800, 1200) == {"code": 200 * 32, "prose": 200 * 32}
    before, after = tokens_between(samples, 799, 800), tokens_between(samples, 800, 801)
    assert tokens_between(samples, 799, 801) == {name: before[name] + after[name] for name in before}
    assert sum(tokens_between(samples, 3, 1000).values()) == 997 * 32


def test_sample_is_a_function_of_its_number(tmp_path: Path, data: dict, world_of_one: None) -> None:
    _, first = run_samples(tmp_path / "a", data)
    _, second = run_samples(tmp_path / "b", data)
    for number in reversed(range(len(first))):
        assert (first[number]["tokens"] == second[number]["tokens"]).all()
        assert (first[number]["tokens"][1:] == first[number]["labels"][:-1]).all()


def test_the_order_of_the_entries_is_of_no_account(tmp_path: Path, data: dict, world_of_one: None) -> None:
    """Nor does the fingerprint know it, so that a run could go on with its entries in another order."""
    changes = {f"phases__{n}__data": [{"name": d, "path": data[d], "weight": 1} for d in data] for n in (0, 1)}
    turned = {key: entries[::-1] for key, entries in changes.items()}
    _, first = run_samples(tmp_path / "a", data, **changes)
    _, second = run_samples(tmp_path / "b", data, **turned)
    for number in range(len(first)):
        assert (first[number]["tokens"] == second[number]["tokens"]).all()


def test_sequences_of_other_lengths_in_one_cache(tmp_path: Path, data: dict, world_of_one: None) -> None:
    run_samples(tmp_path, data)
    _, samples = run_samples(tmp_path, data, batch__sequence_length=64)
    assert len(samples[0]["tokens"]) == 64


def test_a_later_phase_reads_on(tmp_path: Path, world_of_one: None) -> None:
    """Every token has a document of its own: within an epoch no sample may come twice, across phases too."""
    from data_tools.indexed import IndexedWriter

    data = {}
    for number, name in enumerate(("code", "prose")):
        data[name] = str(tmp_path / name)
        with IndexedWriter(tmp_path / name, np.int32) as writer:
            writer.add_document(np.arange(4000, dtype=np.int32) + 4000 * number)
    _, samples = run_samples(tmp_path, data, model__vocab_size=8000)
    starts = Counter(int(samples[i]["tokens"][0]) for i in range(len(samples)))
    assert len(starts) == len(samples) == 64
    assert tokens_between(samples, 0, 64) == {
        name: 32 * sum(start // 4000 == number for start in starts) for number, name in enumerate(data)
    }


def test_many_epochs(tmp_path: Path, world_of_one: None) -> None:
    data = {"code": write_dataset(tmp_path / "code", 3, 0), "prose": write_dataset(tmp_path / "prose", 3, 1)}
    _, samples = run_samples(tmp_path, data, phases__0__tokens=300 * 256)
    assert len(samples[2399]["labels"]) == 32
    code = samples.sequences["code"]
    orders = {str([code[n]["tokens"] for n in range(e * code.per_epoch, (e + 1) * code.per_epoch)]) for e in range(5)}
    assert len(orders) == 5  # each epoch has its own


def test_a_rebuilt_file_is_not_read_with_an_old_index(tmp_path: Path, world_of_one: None) -> None:
    data = {name: write_dataset(tmp_path / name, 60, seed) for seed, name in enumerate(("code", "prose"))}
    before = run_samples(tmp_path, data)[1][0]["tokens"]
    write_dataset(tmp_path / "code", 25, 9)
    write_dataset(tmp_path / "prose", 25, 8)
    _, samples = run_samples(tmp_path, data)
    for number in range(len(samples)):
        assert len(samples[number]["tokens"]) == 32
    assert not (samples[0]["tokens"] == before).all()


def test_weight_zero_leaves_a_data_set_out(tmp_path: Path, data: dict, world_of_one: None) -> None:
    missing = {**data, "prose": "no/such/file"}
    _, samples = run_samples(tmp_path, missing, phases__0__data__1__weight=0, phases__1__data__1__weight=0.0)
    assert tokens_between(samples, 0, 64) == {"code": 64 * 32}


def test_a_token_beyond_the_vocabulary_is_named(tmp_path: Path, data: dict, world_of_one: None) -> None:
    _, samples = run_samples(tmp_path, data, model__vocab_size=40)
    with pytest.raises(UserError, match=r"data set '(code|prose)': token id \d+ is outside .* vocabulary of 40"):
        for number in range(len(samples)):
            samples[number]
    assert VOCAB > 40


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_read_each_sample_of_a_step_once(ranks: int) -> None:
    """The order within a step may depend on the layout; the set of its samples may not."""
    for step in (0, 3):
        micro = 8 // ranks // 1
        numbers = [
            number
            for rank in range(ranks)
            for batch in micro_batches_of_step(step, micro, 1, ranks, rank)
            for number in batch
        ]
        assert sorted(numbers) == list(range(8 * step, 8 * step + 8))


def test_held_out_sequences_count_once(tmp_path: Path, data: dict, world_of_one: None) -> None:
    from jetmoe_megatron.config.schema import HeldOut
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.step_batches import HeldOutSamples

    run = Run.model_validate(small_run(tmp_path, data, evaluation={"sequences": 5}))
    samples = HeldOutSamples(
        HeldOut(name="v", path=data["held_out"]), run, resolve_layout(run, 4), IndexCache(tmp_path / "c")
    )
    assert samples.micro_batches == 1  # 4 ranks x 2 sequences hold all 5
    masks = [float(samples[i]["loss_mask"].sum()) for i in range(8)]
    assert masks == [32.0] * 5 + [0.0] * 3
