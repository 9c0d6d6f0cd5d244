"""What rank 0 decides for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from data_tools.errors import InputError, one_line
from jetmoe_megatron.errors import SharedError, may_pass

T = TypeVar("T")


def decided_by_rank_0(decide: Callable[[], T]) -> T:
    """Returns on all ranks what `decide` returns on rank 0: others may see an older state of a network file system.

    Raises:
        SharedError: on all ranks, with the error of rank 0.
    """
    answer: list[Any] = [None, None, False]
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = decide()
        except (InputError, OSError) as error:
            answer[1:] = one_line(error), may_pass(error)
    torch.distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise SharedError(answer[1], answer[2])
    return answer[0]
