"""Tensors one after the other, cast and checked, the next one read while the last one is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from jetmoe_megatron.config.schema import Model
from jetmoe_megatron.convert.names import Weight
from jetmoe_megatron.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Progress = Callable[[int, int], None]  # bytes done, bytes in all


def no_progress(done: int, total: int) -> None:
    pass


class Folder(Protocol):
    """What a checkpoint and a Hugging Face folder have in common."""

    model: Model
    weights: list[Weight]
    dtype: torch.dtype | None  # of all tensors, or None if they differ

    def read(self, weight: Weight) -> Tensor: ...


def choose_dtype(folder: Folder, name: str | None) -> torch.dtype:
    if name is not None:
        return DTYPES[name]
    if folder.dtype not in DTYPES.values():
        kind = f"tensors of {folder.dtype}" if folder.dtype else "tensors of several types"
        raise UserError(f"it has {kind}: choose bf16, fp16 or fp32 with --dtype")
    return folder.dtype


def read_ahead(folder: Folder, weights: Iterable[Weight], dtype: torch.dtype) -> Iterator[Tensor]:
    """In the order of `weights`. Two tensors are in memory at a time."""
    with ThreadPoolExecutor(1) as reader:
        pending: deque[Future[Tensor]] = deque()
        for weight in weights:
            pending.append(reader.submit(read_as, folder, weight, dtype))
            if len(pending) == 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def read_as(folder: Folder, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Raises UserError if a value is not a number or has no place in `dtype`."""
    tensor = folder.read(weight)
    low, high = (value.item() for value in tensor.aminmax())
    if low != low or high != high:
        raise UserError(f"{weight.hugging_face}: holds values that are not numbers (NaN)")
    largest = max(-low, high)
    if largest > torch.finfo(dtype).max:
        name = next(name for name, known in DTYPES.items() if known == dtype)
        raise UserError(f"{weight.hugging_face}: holds {largest:g}, which {name} cannot: choose another --dtype")
    return tensor.to(dtype).contiguous()
