"""Two runs never write into one folder, and ranks that see different files say so."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tests.ranks import run_ranks
from tests.support import REPO, metrics, pretrain, small_run, write_run


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, data: dict) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run_file, "debug.max_steps=2").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    lock = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as the first run has it
    refused = pretrain(2, run_file)
    os.close(lock)
    assert refused.returncode != 0
    lines = [line for line in refused.stderr.splitlines() if "error: output_dir" in line]
    assert len(lines) == 1 and "another process is training into" in lines[0], refused.stderr
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
    assert pretrain(1, run_file).returncode == 0
    assert len(metrics(tmp_path / "run")) == 8


def differing(data: dict[str, str]) -> str:
    from jetmoe_megatron.config import Run
    from jetmoe_megatron.errors import SharedError
    from jetmoe_megatron.runtime.device import process_group
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
    from jetmoe_megatron.runtime.device import process_group
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


def seeing(folders: list[str]) -> str:
    from jetmoe_megatron.errors import SharedError
    from jetmoe_megatron.runtime.device import process_group
    from jetmoe_megatron.training import together

    together._SEEN_LATE_SECONDS = 0.5
    rank = int(os.environ["RANK"])
    with process_group():
        real = together.decided_by_rank_0
        together.decided_by_rank_0 = lambda decide: Path(folders[rank]) / real(decide).name  # its own disk, so named
        try:
            together.check_ranks_share(Path(folders[rank]))
        except SharedError as error:
            return str(error)
    return "shared"


def test_ranks_that_see_other_folders(tmp_path: Path) -> None:
    """Else each would write its part of every checkpoint into another one, and none could be loaded."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    assert run_ranks(2, seeing, [str(one)] * 2) == ["shared"] * 2
    for text in run_ranks(2, seeing, [str(one), str(other)]):
        assert text.startswith("output_dir: ") and text.endswith("is not the folder that rank 0 writes to")
    assert not list(tmp_path.glob("*/*")) and not list(tmp_path.glob("*/.seen*"))


def code(package: str) -> str:
    from jetmoe_megatron.config import Run
    from jetmoe_megatron.errors import SharedError
    from jetmoe_megatron.runtime.device import process_group
    from jetmoe_megatron.training import together

    if os.environ["RANK"] == "1":
        together._ROOT = Path(package)
    with process_group():
        try:
            together.check_ranks_read_the_same(Run.model_validate(small_run(Path("x"), {"code": "c", "prose": "p"})))
        except SharedError as error:
            return str(error)
    return "the same"


def test_ranks_that_run_other_code(tmp_path: Path) -> None:
    assert run_ranks(2, code, str(REPO)) == ["the same"] * 2
    (tmp_path / "jetmoe_megatron").mkdir()
    assert all("rank 1 of 2 runs other code than rank 0" in text for text in run_ranks(2, code, str(tmp_path)))
