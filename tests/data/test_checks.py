"""Data files that cannot be trained on are named before anything starts."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.errors import InputError
from data_tools.indexed import IndexedWriter
from jetmoe_megatron.config import Run
from jetmoe_megatron.data.checks import check_data
from jetmoe_megatron.errors import UserError
from tests.support import command, small_run, write_dataset


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    return {name: write_dataset(tmp_path / name, 30, seed) for seed, name in enumerate(("code", "prose"))}


def refused(own: dict[str, str], **changes: object) -> str:
    with pytest.raises(InputError) as caught:
        check_data(Run.model_validate(small_run(Path("x"), own, **changes)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_good_data_passes(own: dict[str, str]) -> None:
    check_data(Run.model_validate(small_run(Path("x"), own)))


def test_a_set_that_no_check_saw_is_too_short(own: dict[str, str], tmp_path: Path) -> None:
    """Object storage is looked at when it is opened."""
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.sequences import Sequences

    run = Run.model_validate(small_run(Path("x"), own, batch__sequence_length=10**6, batch__global_tokens=10**6))
    with pytest.raises(UserError, match="tokens are too few for one sequence of 1000000"):
        Sequences(own["code"], run, IndexCache(tmp_path), seed=0)


class _Bad(torch.utils.data.Dataset):
    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        raise UserError("data set 'code': token id 7 is outside")


def test_what_a_worker_finds_is_one_line() -> None:
    from jetmoe_megatron.data.step_batches import StepBatches

    batches = StepBatches(_Bad(), range(1), 1, 1, 1, 0)
    for workers in (0, 1):  # as on a GPU
        batches.loader = torch.utils.data.DataLoader(_Bad(), batch_sampler=[[0]], num_workers=workers)
        with pytest.raises(UserError, match="^data set 'code': token id 7 is outside$"):
            next(iter(batches))


class _Slow(torch.utils.data.Dataset):
    def __getitem__(self, sample: int) -> int:
        time.sleep(0.02)
        return os.getpid()


def test_a_signal_for_the_whole_job_leaves_the_readers_alone() -> None:
    """On a GPU data is read by processes. Were they to end, the rank would, before it has saved."""
    from jetmoe_megatron.data.step_batches import StepBatches, begin_reader

    loader = StepBatches(_Slow(), range(1), 1, 1, 1, 0).loader
    assert loader.worker_init_fn is begin_reader
    loader = torch.utils.data.DataLoader(_Slow(), sampler=range(20), num_workers=1, worker_init_fn=begin_reader)
    workers = set()
    for batch in loader:
        workers.add(int(batch))
        os.kill(int(batch), signal.SIGTERM)
    assert len(workers) == 1


FAILS = """
import torch
from jetmoe_megatron.data.step_batches import begin_reader

def batches():
    samples = torch.utils.data.DataLoader(range(1000), num_workers=2, worker_init_fn=begin_reader)
    yield from samples

def train():
    for batch in batches():
        raise torch.OutOfMemoryError("made up")

train()
"""


def test_an_error_ends_the_process_and_its_readers() -> None:
    """Its traceback holds the loader, and Python would wait for readers that heed no SIGTERM."""
    ended = command(sys.executable, "-c", FAILS, timeout=60)
    assert ended.returncode == 1 and ended.stderr.strip().endswith("OutOfMemoryError: made up"), ended.stderr


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing(own: dict[str, str], suffix: str) -> None:
    os.remove(own["prose"] + suffix)
    assert own["prose"] + suffix in refused(own)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("keep", [0, 1, 8, 20, 40, -1, -7])
def test_truncated(own: dict[str, str], suffix: str, keep: int, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the index is too long to be gone through before training."""
    if long:
        monkeypatch.setattr("jetmoe_megatron.data.checks._SCAN_SEQUENCES", 1)
    file = Path(own["prose"] + suffix)
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    assert own["prose"] in refused(own)


def test_not_an_index(own: dict[str, str]) -> None:
    Path(own["code"] + ".idx").write_text("not an index, but long enough to look at " * 10)
    assert own["code"] + ".idx" in refused(own)


def test_too_short_for_one_sequence(own: dict[str, str], tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "short", np.uint16) as writer:
        writer.add_document(np.arange(32, dtype=np.uint16))  # the next token of the last one is missing
    own["prose"] = str(tmp_path / "short")
    message = refused(own)
    assert "data set 'prose'" in message and "32 tokens are too few for one sequence of 32" in message


def test_token_beyond_the_vocabulary(own: dict[str, str]) -> None:
    assert "is outside the model's vocabulary of 90" in refused(own, model__vocab_size=90)


def test_held_out_data_is_looked_at_too(own: dict[str, str]) -> None:
    message = refused(own, evaluation={"data": [{"name": "v", "path": "no/such"}]})
    assert "no/such" in message
