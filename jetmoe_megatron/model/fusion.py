"""Several elementwise operations as one GPU kernel. Without a GPU, a fused function is the plain function."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
logger = logging.getLogger(__name__)


def fused(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, through torch.compile if its first argument is on a GPU.

    The result has no gradient: callers write the backward pass.
    """

    @functools.cache
    def compiled() -> Callable[..., T]:  # only when it is called: importing the compiler takes seconds
        return torch.compile(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> T:
        return (compiled() if arguments[0].is_cuda and can_fuse() else function)(*arguments)

    return call


@functools.cache
def can_fuse() -> bool:
    """Whether a kernel can be compiled here. That needs triton and a C compiler, which a bare machine may lack."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device="cuda"))
        return True
    except Exception as error:  # whatever torch's compiler raises
        reason = str(error).strip().splitlines()[0]
        logger.warning("elementwise operations are not fused: torch.compile does not work here: %s", reason)
        return False
