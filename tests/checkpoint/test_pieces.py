"""Our own rules find a piece of a tensor: they accept what torch.save writes, and nothing else."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo

from jetmoe_megatron.checkpoint.pieces import find_piece, read_rows

BEFORE, AFTER = b"what lies before", b"and after PK\x05\x06"


def saved(tensor: Any) -> bytes:
    content = io.BytesIO()
    torch.save(tensor, content)
    return content.getvalue()


def read(content: bytes, like: Tensor) -> Tensor:
    """All rows but the first."""
    file = io.BytesIO(BEFORE + content + AFTER)
    piece = find_piece(file, _StorageInfo("__0_0.distcp", len(BEFORE), len(content)), like.shape, like.dtype)
    assert piece.shape == like.shape and piece.dtype == like.dtype
    return read_rows(file, piece, 1, len(like) - 1) if like.dim() else read_rows(file, piece)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (3, 1, 7), (4, 0), (300, 1000)], ids=str)
def test_what_torch_writes_is_read(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    assert read(saved(tensor), tensor).equal(tensor[1:] if shape else tensor)


def test_a_piece_of_more_than_4_gib_has_other_headers() -> None:
    """As zip writes them for a large file, here for a small one."""
    tensor, content = torch.randn(3, 4), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(tensor))) as small, zipfile.ZipFile(content, "w") as large:
        for name in small.namelist():
            with large.open(name, "w", force_zip64=True) as entry:
                entry.write(small.read(name))
    assert read(content.getvalue(), tensor).equal(tensor[1:])


LIKE = torch.arange(12.0).view(3, 4)


def changed(edit: Callable[[dict[str, bytes]], Any], compression: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(LIKE))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    edit(entries)
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    return content.getvalue()


def rename(entries: dict[str, bytes]) -> None:
    entries["archive/data/1"] = entries.pop("archive/data/0")


def of_pickle(content: bytes) -> bytes:
    return changed(lambda entries: entries.update({"archive/data.pkl": content}))


class Storage:
    """Written as the numbers of a tensor are: a tuple in the place of an object."""

    def __init__(self, *about: Any) -> None:
        self.about = about


class Pickler(pickle._Pickler):
    def persistent_id(self, entry: Any) -> Any:
        return entry.about if isinstance(entry, Storage) else None


class Rebuilt:
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


def described(
    kind: Any = "storage",
    storage: Any = torch.FloatStorage,
    key: Any = "0",
    numbers: Any = 12,
    first: Any = 0,
    shape: Any = (3, 4),
    stride: Any = (4, 1),
) -> bytes:
    content = io.BytesIO()
    about = Storage(kind, storage, key, "cpu", numbers)
    Pickler(content, 2).dump(Rebuilt(about, first, shape, stride, False, OrderedDict()))
    return of_pickle(content.getvalue())


def test_the_crafted_ones_begin_with_a_good_one() -> None:
    assert read(described(), LIKE).equal(LIKE[1:])


CRAFTED = {
    "no archive": b"PK" * 500,
    "empty": b"",
    "an archive of nothing": changed(dict.clear),
    "no pickle": changed(lambda entries: entries.pop("archive/data.pkl")),
    "no numbers": changed(lambda entries: entries.pop("archive/data/0")),
    "numbers under another name": changed(rename),
    "too few numbers": changed(lambda entries: entries.update({"archive/data/0": bytes(44)})),
    "too many numbers": changed(lambda entries: entries.update({"archive/data/0": bytes(52)})),
    "compressed": changed(lambda entries: None, zipfile.ZIP_DEFLATED),
    "a bomb": changed(lambda entries: entries.update({"archive/data.pkl": bytes(2**28)}), zipfile.ZIP_DEFLATED),
    "a large pickle": of_pickle(bytes(2**17)),
    "another processor's": changed(lambda entries: entries.update({"archive/byteorder": b"big"})),
    "cut off": saved(LIKE)[:-30],
    "another dtype": saved(LIKE.double()),
    "another shape": saved(LIKE.view(4, 3)),
    "transposed": saved(LIKE.view(4, 3).t()),
    "part of its numbers": saved(torch.arange(20.0)[4:16].view(3, 4)),
    "an object": saved({"a": LIKE}),
    "integers": saved(LIKE.long()),
    "a parameter": saved(torch.nn.Parameter(LIKE)),
    "a list in a list in a list": of_pickle(b"\x80\x02" + b"]" * 30_000 + b"a" * 29_999 + b"."),
    "a place in the memo": of_pickle(b"\x80\x02Nr\xff\xff\xff\x7f."),
    "a function": of_pickle(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
    "a number for a storage": described(storage=7),
    "a text for a storage": described(storage="FloatStorage"),
    "another kind": described(kind="file"),
    "a key that is no text": described(key=["0"]),
    "a key of another folder": described(key="../data.pkl"),
    "numbers that are no number": described(numbers=12.0),
    "a shape of texts": described(shape=("3", "4")),
    "a shape of truths": described(shape=(True, 12), stride=(12, 1)),
    "no shape": described(shape=None),
    "fewer strides": described(stride=(4,)),
    "no strides": described(stride=None),
    "one number for all": described(numbers=1, stride=(0, 0)),
    "a first number": described(first=1),
}


@pytest.mark.parametrize("content", CRAFTED.values(), ids=CRAFTED.keys())
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as raised:
        read(content, LIKE)
    assert type(raised.value) is ValueError


def test_bytes_that_were_turned_are_refused_or_change_numbers_alone() -> None:
    good = saved(LIKE)
    for place in range(len(good)):
        spoilt = good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :]
        try:
            assert read(spoilt, LIKE).shape == (2, 4)
        except ValueError as error:
            assert "\n" not in str(error)
