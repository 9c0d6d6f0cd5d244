"""What rank 0 decides, or refuses, holds on all ranks."""

from __future__ import annotations

import errno

from tests.ranks import run_ranks


def deciding() -> list[object]:
    import torch

    from jetmoe_megatron.errors import SharedError, UserError, may_pass
    from jetmoe_megatron.runtime.device import process_group
    from jetmoe_megatron.runtime.rank_0 import decided_by_rank_0

    def refuse() -> None:
        raise UserError(f"rank {torch.distributed.get_rank()} says no")

    def read() -> None:
        raise OSError(errno.EIO, "Input/output error", "run.yaml")

    with process_group():
        found: list[object] = [decided_by_rank_0(lambda: str(torch.distributed.get_rank()))]
        for decide in (refuse, read):
            try:
                decided_by_rank_0(decide)
            except SharedError as error:
                found.append((str(error), may_pass(error)))
    return found


def test_rank_0_decides_and_refuses_for_all() -> None:
    assert run_ranks(2, deciding) == [["0", ("rank 0 says no", False), ("run.yaml: Input/output error", True)]] * 2
