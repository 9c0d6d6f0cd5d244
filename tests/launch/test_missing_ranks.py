"""Dumps of real ranks say which of them did not come to which collective."""

from __future__ import annotations

import json
import os
import pickle
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jetmoe_megatron.launch.missing_ranks import missing_ranks
from tests.injected_faults import ELASTIC, Fault, pretrain_with
from tests.ranks import run_ranks
from tests.support import small_run, write_run


def fail(folder: str, dumping: list[int], as_nccl: bool) -> None:
    """Rank 2 leaves out the second collective of all ranks. Those in `dumping` write dumps."""
    from jetmoe_megatron.runtime.flight_recorder import record_into, write_dump

    dumps = record_into(Path(folder))
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    pair, numbers = dist.new_group([0, 2], group_desc="PAIR"), torch.ones(3)
    with pytest.raises(RuntimeError):
        dist.all_reduce(numbers)
        if dist.get_rank() != 1:
            dist.all_reduce(numbers, group=pair)
        if dist.get_rank() != 2:
            dist.all_reduce(numbers)
        raise RuntimeError("ends the collective of the others")
    if dist.get_rank() in dumping:
        write_dump(dumps)
        if as_nccl:
            (file,) = dumps.glob(f"gloo_{dist.get_rank()}")
            (dumps / f"nccl_{dist.get_rank()}").write_bytes(pickle.dumps(json.loads(file.read_text()), protocol=2))
            file.unlink()


@pytest.mark.parametrize("as_nccl", [False, True], ids=["ours", "NCCL's"])
def test_the_rank_and_the_collective_are_named(as_nccl: bool, tmp_path: Path) -> None:
    run_ranks(3, fail, str(tmp_path), [0, 1, 2], as_nccl)
    (dumps,) = tmp_path.iterdir()
    assert missing_ranks(dumps) == [
        "rank 2 did not come to gloo:all_reduce number 2 of the group 0:default_pg, where rank 0, 1 waited",
        f"dumps of 3 ranks: {dumps}",
    ]


def test_without_the_dump_of_that_rank_the_others_say_where_they_were(tmp_path: Path) -> None:
    run_ranks(3, fail, str(tmp_path), [0, 1], False)
    (dumps,) = tmp_path.iterdir()
    assert missing_ranks(dumps)[0] == "last call of rank 0, 1: gloo:all_reduce number 2 of the group 0:default_pg"


class _Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch it-ran",)


def test_a_dump_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nccl_0").write_bytes(pickle.dumps(_Runs()))
    assert missing_ranks(tmp_path)[0].endswith(
        "nccl_0 cannot be read: it names posix.system, which no checkpoint needs"
    )
    assert not (tmp_path / "it-ran").exists()


def test_no_dumps(tmp_path: Path) -> None:
    assert missing_ranks(tmp_path) == [] == missing_ranks(tmp_path / "none")


def test_the_launcher_says_it(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data, parallel={"timeout_minutes": 0.25}))
    result = pretrain_with([Fault("raise", 3, rank=1)], 2, run_file, launcher=ELASTIC)
    assert result.returncode == 1
    assert "jetmoe_megatron.launch.elastic: rank 1 did not come to gloo:all_reduce number " in result.stderr
    assert len(list((tmp_path / "run/logs/flight_recorder").glob("*/gloo_*"))) == 2


def test_a_run_without_a_failure_leaves_nothing(tmp_path: Path, data: dict[str, str]) -> None:
    assert pretrain_with([], 2, write_run(tmp_path, small_run(tmp_path, data)), launcher=ELASTIC).returncode == 0
    assert not (tmp_path / "run/logs/flight_recorder").exists()
