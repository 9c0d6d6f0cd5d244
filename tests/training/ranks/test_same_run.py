"""Ranks that were given different run files, other code or another folder say so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from tests.ranks import run_ranks
from tests.support import REPO, small_run


def differing(data: dict[str, str]) -> str:
    from jetmoe_megatron.config import Run
    from jetmoe_megatron.errors import SharedError
    from jetmoe_megatron.runtime.device import process_group
    from jetmoe_megatron.training.ranks.same_run import check_ranks_read_the_same

    rank = int(os.environ["RANK"])
    with process_group():
        try:
            check_ranks_read_the_same(Run.model_validate(small_run(Path("x"), data, seed=7 if rank == 1 else 5)))
        except SharedError as error:
            return str(error)
    return "the same"


def test_ranks_that_have_read_different_runs(data: dict) -> None:
    assert {text.split(":")[0] for text in run_ranks(3, differing, data)} == {
        "rank 1 of 3 was given a different run file than rank 0"
    }


def seeing(folders: list[str]) -> str:
    from jetmoe_megatron.errors import SharedError
    from jetmoe_megatron.runtime.device import process_group
    from jetmoe_megatron.runtime.rank_0 import decided_by_rank_0
    from jetmoe_megatron.training.ranks import same_run

    rank = int(os.environ["RANK"])

    def on_its_own_disk(decide: Callable[[], Path]) -> Path:
        return Path(folders[rank]) / decided_by_rank_0(decide).name

    with process_group(), patch.multiple(same_run, SEEN_LATE_SECONDS=0.5, decided_by_rank_0=on_its_own_disk):
        try:
            same_run.check_ranks_share(Path(folders[rank]))
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
    from jetmoe_megatron.training.ranks import same_run

    if os.environ["RANK"] == "1":
        same_run._ROOT = Path(package)
    with process_group():
        try:
            same_run.check_ranks_read_the_same(Run.model_validate(small_run(Path("x"), {"code": "c", "prose": "p"})))
        except SharedError as error:
            return str(error)
    return "the same"


def test_ranks_that_run_other_code(tmp_path: Path) -> None:
    assert run_ranks(2, code, str(REPO)) == ["the same"] * 2
    (tmp_path / "jetmoe_megatron").mkdir()
    assert all("rank 1 of 2 runs other code than rank 0" in text for text in run_ranks(2, code, str(tmp_path)))
