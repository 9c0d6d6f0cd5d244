"""Tensors in blocks that stay in the processor's cache between reading and writing.

This is several times as fast as reading and writing whole tensors of hundreds of megabytes, and takes hardly any
memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import isfinite, prod
from typing import Protocol

import torch
from torch import Tensor

from jetmoe_megatron.config.schema import Model
from jetmoe_megatron.convert.hf_names import Weight
from jetmoe_megatron.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCK = 1 << 18  # values: half a megabyte in bf16


class Folder(Protocol):
    """What a checkpoint and a Hugging Face folder have in common."""

    model: Model
    weights: list[Weight]
    dtype: torch.dtype | None  # of all tensors, or None if they differ

    def blocks(self, weight: Weight) -> Iterator[Tensor]:
        """The values as stored, in the order of Hugging Face's tensor."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread: a block is too small to share, and on busy cores, threads lose time by waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_dtype(folder: Folder, name: str | None) -> torch.dtype:
    if name is not None:
        return DTYPES[name]
    if folder.dtype is None or folder.dtype not in DTYPES.values():
        kind = f"tensors of {folder.dtype}" if folder.dtype else "tensors of several types"
        raise UserError(f"it has {kind}: choose bf16, fp16 or fp32 with --dtype")
    return folder.dtype


def cast(blocks: Iterator[Tensor], weight: Weight, dtype: torch.dtype) -> Iterator[Tensor]:
    """Raises UserError if a value is not a finite number, or does not fit into `dtype`."""
    for block in blocks:
        result = block.to(dtype)
        if not all(isfinite(value) for value in result.aminmax()):
            if block.isnan().any():
                raise UserError(f"{weight.hugging_face}: holds values that are not numbers (NaN)")
            name = next(name for name, known in DTYPES.items() if known == dtype)
            largest = block.abs().max()
            raise UserError(f"{weight.hugging_face}: holds {largest:g}, which {name} cannot hold: use another --dtype")
        yield result


def ahead(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same blocks, read a few ahead in a separate thread, because reading and writing both wait for the disk."""
    with ThreadPoolExecutor(1) as reader:
        pending = deque(reader.submit(next, blocks, None) for _ in range(4))
        while (block := pending.popleft().result()) is not None:
            pending.append(reader.submit(next, blocks, None))
            yield block


def joined(blocks: Iterator[Tensor], weight: Weight) -> Tensor:
    """The whole tensor, in Hugging Face's shape."""
    whole, done = torch.empty(0), 0
    for block in blocks:
        if done == 0:
            whole = torch.empty(prod(weight.shape), dtype=block.dtype)
        whole[done : done + block.numel()] = block
        done += block.numel()
    return whole.view(weight.shape)
