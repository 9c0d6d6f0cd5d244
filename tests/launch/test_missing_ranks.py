"""Dumps of real ranks say which of them did not come to which collective."""

from __future__ import annotations

import json
import os
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jetmoe_megatron.launch import elastic
from jetmoe_megatron.launch.missing_ranks import Missing, missing_ranks
from jetmoe_megatron.runtime.failed_nodes import recorded
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
    found = missing_ranks(dumps)
    assert found.lines == [
        "rank 2 did not come to gloo:all_reduce number 2 of the group 0:default_pg, where rank 0, 1 waited",
        f"dumps of 3 ranks: {dumps}",
    ]
    assert found.ranks == [2]


def test_without_the_dump_of_that_rank_the_others_say_where_they_were(tmp_path: Path) -> None:
    run_ranks(3, fail, str(tmp_path), [0, 1], False)
    (dumps,) = tmp_path.iterdir()
    assert missing_ranks(dumps).lines[0] == "last call of rank 0, 1: gloo:all_reduce number 2 of the group 0:default_pg"


class _Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch it-ran",)


def test_a_dump_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nccl_0").write_bytes(pickle.dumps(_Runs()))
    assert (
        missing_ranks(tmp_path)
        .lines[0]
        .endswith("nccl_0 cannot be read: it names posix.system, which no checkpoint needs")
    )
    assert not (tmp_path / "it-ran").exists()


def test_no_dumps(tmp_path: Path) -> None:
    assert missing_ranks(tmp_path) == missing_ranks(tmp_path / "none") == Missing([])


def test_the_launcher_says_it(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data, parallel={"timeout_minutes": 0.25}))
    result = pretrain_with([Fault("raise", 3, rank=1)], 2, run_file, launcher=ELASTIC)
    assert result.returncode == 1
    assert "jetmoe_megatron.launch.elastic: rank 1 did not come to gloo:all_reduce number " in result.stderr
    assert len(list((tmp_path / "run/logs/flight_recorder").glob("*/gloo_*"))) == 2


@pytest.mark.parametrize(("ranks", "named"), [([2], {"b"}), ([2, 3], {"b"}), ([1, 2], set()), ([], set())])
def test_the_node_of_missing_ranks(ranks: list[int], named: set[str], tmp_path: Path, monkeypatch: Any) -> None:
    """If all of them are on one: it is left out of the next start. Over NCCL, no rank knows it."""
    monkeypatch.setenv("JETMOE_FAILED_NODES", str(tmp_path / "failed_nodes"))
    monkeypatch.setattr(elastic, "missing_ranks", lambda dumps: Missing(["they did not come"], ranks))
    (tmp_path / "nodes").write_text(json.dumps(["a", "a", "b", "b"]))  # as rank 0 leaves it
    (tmp_path / "dumps").write_text(str(tmp_path))
    elastic._report_missing_ranks(tmp_path)
    assert set(recorded(tmp_path / "failed_nodes", [])) == named


def test_a_run_without_a_failure_leaves_nothing(tmp_path: Path, data: dict[str, str]) -> None:
    assert pretrain_with([], 2, write_run(tmp_path, small_run(tmp_path, data)), launcher=ELASTIC).returncode == 0
    assert not (tmp_path / "run/logs/flight_recorder").exists()


def test_the_ranks_of_a_group_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's analyser evaluates them."""
    monkeypatch.chdir(tmp_path)
    group = {"desc": "default_pg", "ranks": repr("__import__('os').system('touch it-ran')")}
    entry = {"record_id": 0, "process_group": ["0", "default_pg"], "collective_seq_id": 1, "p2p_seq_id": 0}
    dump = {"version": "2.10", "entries": [entry | {"is_p2p": False}], "pg_config": {"0": group}}
    (tmp_path / "gloo_0").write_text(json.dumps(dump))
    assert "cannot be read: " in missing_ranks(tmp_path).lines[0]
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("dump", ["[" * 10**5, "[]", '{"version": "2.10", "entries": [], "pg_config": []}'])
def test_junk_is_one_line(dump: str, tmp_path: Path) -> None:
    (tmp_path / "gloo_0").write_text(dump)
    (said,) = missing_ranks(tmp_path).lines
    assert said.startswith(f"the dumps in {tmp_path} cannot be read: ")


def differ(folder: str) -> None:
    """The ranks make different calls."""
    from jetmoe_megatron.runtime.flight_recorder import record_into, write_dump

    dumps = record_into(Path(folder))
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    dist.all_reduce(torch.ones(3))
    with pytest.raises(RuntimeError):
        if dist.get_rank() == 0:
            dist.all_reduce(torch.ones(3))
        else:
            dist.broadcast(torch.ones(3), src=0)
        raise RuntimeError("if gloo does not notice it")
    write_dump(dumps)


def test_ranks_that_make_different_calls(tmp_path: Path) -> None:
    run_ranks(2, differ, str(tmp_path))
    (dumps,) = tmp_path.iterdir()
    said = missing_ranks(dumps).lines[0]
    assert said.startswith("rank 1 differs from others in gloo:all_reduce number 2 of the group 0:default_pg: "), said
    assert "COLLECTIVE_TYPE_MISMATCH" in said


def begin(folder: str, launcher: str) -> None:
    from jetmoe_megatron.runtime.flight_recorder import record_into

    os.environ |= {"JETMOE_LAUNCHER_FOLDER": launcher, "TORCHELASTIC_RUN_ID": "group/run"}
    dumps = record_into(Path(folder))
    assert dumps.parent == Path(folder)
    assert not dumps.exists() or not list(dumps.iterdir())
    dumps.mkdir(parents=True, exist_ok=True)
    (dumps / "gloo_1").write_text("{}")


def test_dumps_of_an_earlier_start_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name can be the same: without --rdzv-id and --rdzv-endpoint, torchrun's port and id do not change."""
    monkeypatch.setenv("MASTER_PORT", "29500")
    for _ in range(2):
        run_ranks(1, begin, str(tmp_path / "run"), str(tmp_path))


def fail_late(folder: str) -> None:
    """Ranks 0 and 1 make more calls than rank 2. Rank 0 leaves out the last of all ranks. Few calls are recorded."""
    from jetmoe_megatron.runtime.flight_recorder import record_into, write_dump

    os.environ["TORCH_FR_BUFFER_SIZE"] = "20"
    dumps = record_into(Path(folder))
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    pair, numbers = dist.new_group([0, 1], group_desc="PAIR"), torch.ones(3)
    with pytest.raises(RuntimeError):
        for _ in range(40):
            dist.all_reduce(numbers)
            if dist.get_rank() != 2:
                dist.all_reduce(numbers, group=pair)
        if dist.get_rank() != 0:
            dist.all_reduce(numbers)
        raise RuntimeError("ends the collective of the others")
    write_dump(dumps)


def test_ranks_that_have_made_different_numbers_of_calls(tmp_path: Path) -> None:
    run_ranks(3, fail_late, str(tmp_path))
    (dumps,) = tmp_path.iterdir()
    assert missing_ranks(dumps).lines[0] == (
        "rank 0 did not come to gloo:all_reduce number 41 of the group 0:default_pg, where rank 1, 2 waited"
    )
