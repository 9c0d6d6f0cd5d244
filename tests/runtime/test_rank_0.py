"""What rank 0 decides, or refuses, holds on all ranks."""

from __future__ import annotations

from tests.ranks import run_ranks


def deciding() -> list[str]:
    import torch

    from jetmoe_megatron.errors import SharedError, UserError
    from jetmoe_megatron.runtime.device import process_group
    from jetmoe_megatron.runtime.rank_0 import decided_by_rank_0

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
