"""What is left of the folder for dumps, after which end."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetmoe_megatron.errors import SharedError, UserError
from jetmoe_megatron.training.ranks import process_groups


@pytest.mark.parametrize(
    ("error", "stays"), [(None, False), (SharedError("x"), False), (RuntimeError("x"), True), (UserError("x"), True)]
)
def test_the_folder_stays_for_the_dumps_of_other_ranks(error: Exception | None, stays: bool, tmp_path: Path) -> None:
    """On a GPU the folder is made at the start, and NCCL writes when a rank has waited too long."""
    dumps = tmp_path / "run/logs/flight_recorder/start"
    dumps.mkdir(parents=True)
    try:
        with process_groups._dumped(dumps):
            if error:
                raise error
    except (RuntimeError, UserError):
        pass
    assert dumps.exists() == stays == (tmp_path / "run/logs").exists()
