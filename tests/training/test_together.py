"""Two runs never write into one folder, and ranks that see different files say so."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tests.ranks import run_ranks
from tests.support import metrics, pretrain, small_run, write_run


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, data: dict) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run_file, "debug.max_steps=2").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    lock = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as the first run has it
    refused = pretrain(2, run_file)
    os.close(lock)
    assert refused.returncode != 0
    lines = [line for line in refused.stderr.splitlines() if "error: output_dir" in line]
    assert len(lines) == 1 and "another process is training into" in lines[0], refused.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert pretrain(1, run_file).returncode == 0
    assert len(metrics(tmp_path / "run")) == 8


def differing(data: dict[str, str]) -> str:
    from jetmoe_megatron.config import Run
    from jetmoe_megatron.errors import SharedError
    from jetmoe_megatron.platform.device import process_group
    from jetmoe_megatron.training.together import check_ranks_read_the_same

    rank = int(os.environ["RANK"])
    with process_group():
        try:
            check_ranks_read_the_same(Run.model_validate(small_run(Path("x"), data, seed=7 if rank == 1 else 5)))
        except SharedError as error:
            return str(error)
    return "the same"


def test_ranks_that_have_read_different_runs(data: dict) -> None:
    assert {text.split(":")[0] for text in run_ranks(3, differing, data)} == {
        "rank 1 of 3 has read another run than rank 0"
    }


def deciding() -> list[str]:
    import torch

    from jetmoe_megatron.errors import SharedError, UserError
    from jetmoe_megatron.platform.device import process_group
    from jetmoe_megatron.training.together import decided_by_rank_0

    def refuse() -> None:
        raise UserError(f"rank {torch.distributed.get_rank()} says no")

    with process_group():
        found = [decided_by_rank_0(lambda: str(torch.distributed.get_rank()))]
        try:
            decided_by_rank_0(refuse)
        except SharedError as error:
            found.append(str(error))
    return found


def test_rank_0_decides_and_refuses_for_all() -> None:
    assert run_ranks(2, deciding) == [["0", "rank 0 says no"]] * 2
