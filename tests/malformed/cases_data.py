"""Indexed datasets and the cache of sample indices.

A small index (`code`, D documents of one sequence each): 34 bytes of header, D int32 lengths, D int64 byte offsets,
D + 1 int64 document bounds.
"""

from __future__ import annotations

import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.indexed import IndexedWriter
from tests.malformed.world import DATA, Case, Crafted, World

D = DATA["code"]
VERSION, CODE, SEQUENCES, BOUNDS, LENGTHS = 9, 17, 18, 26, 34
OFFSETS, DOCUMENTS = LENGTHS + 4 * D, LENGTHS + 12 * D
SIZE = DOCUMENTS + 8 * (D + 1)


def _case(name: str, harm: Callable[[World], Any], said: str, **changes: Any) -> Case:
    def make(world: World) -> list[Any]:
        world.put("data")
        harm(world)
        return world.train(**changes)

    return Case(name, make, said)


def _index(name: str, offset: int, form: str, value: float, said: str) -> Case:
    packed = struct.pack(f"<{form}", value)
    return _case(
        f"index, {name}", lambda world: world.patch("data/code.idx", offset, packed), rf"code\.(idx|bin).*{said}"
    )


def _cut(size: int) -> Case:
    said = "not a Megatron index" if size < LENGTHS else f"cut short, {size} bytes instead of {SIZE}"
    harm = lambda world: os.truncate(world / "data/code.idx", size)  # noqa: E731
    return _case(f"index of {size} bytes", harm, rf"code\.idx: {said}")


def _spoilt(name: str, how: str, said: str) -> Case:
    return _case(f"{name}, {how}", lambda world: world.spoil(f"data/{name}", how), said)


def _swapped(world: World) -> None:
    idx, data = world / "data/code.idx", world / "data/code.bin"
    idx.rename(world / "data/x")
    data.rename(idx)
    (world / "data/x").rename(data)


def _of_another(suffix: str) -> Callable[[World], Any]:
    return lambda world: shutil.copy(world / f"data/prose.{suffix}", world / f"data/code.{suffix}")


def _rewrite(*documents: list[int], dtype: Any = np.uint16) -> Callable[[World], None]:
    def write(world: World) -> None:
        with IndexedWriter(world / "data/code", dtype) as writer:
            for document in documents:
                writer.add_document(np.array(document))

    return write


def _floats(code: int, dtype: Any, value: float) -> Callable[[World], None]:
    """A dataset that fits its index to the byte, but holds floats."""

    def write(world: World) -> None:
        ids = np.full(500, value, dtype)
        index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, 1, 2)
        index += struct.pack("<iqqq", len(ids), 0, 0, 1)
        world.write("data/code.idx", index)
        world.write("data/code.bin", ids.tobytes())

    return write


TRUNCATED = [_cut(n) for n in (2, 9, 16, 17, 18, 26, 33, 34, 35, OFFSETS, OFFSETS + 4, DOCUMENTS, SIZE - 8, SIZE - 2)]

HEADERS = [
    _index("magic turned", 0, "B", 0x4C, "not a Megatron index"),
    _index("last byte of the magic", 8, "B", 1, "not a Megatron index"),
    _index("version 0", VERSION, "Q", 0, "version 0 with dtype code 8 is unknown"),
    _index("version of 64 bits", VERSION, "Q", 2**64 - 1, "version 18446744073709551615 with"),
    _index("big-endian version", VERSION, "Q", 2**56, "version 72057594037927936 with"),
    _index("dtype 0", CODE, "B", 0, "dtype code 0 is unknown"),
    _index("dtype 9", CODE, "B", 9, "dtype code 9 is unknown"),
    _index("dtype 255", CODE, "B", 255, "dtype code 255 is unknown"),
    _index("dtype uint8", CODE, "B", 1, "disagree"),
    _index("dtype int32", CODE, "B", 4, "disagree"),
    _index("dtype int64", CODE, "B", 5, "disagree"),
    _index("dtype float64", CODE, "B", 6, "float64"),
    _index("dtype float32", CODE, "B", 7, "float32"),
    _index("a sequence too many", SEQUENCES, "Q", D + 1, "cut short"),
    _index("a sequence too few", SEQUENCES, "Q", D - 1, "too long"),
    _index("no sequences", SEQUENCES, "Q", 0, "too long"),
    _index("2**60 sequences", SEQUENCES, "Q", 2**60, "cut short"),
    _index("2**64 - 1 sequences", SEQUENCES, "Q", 2**64 - 1, "cut short"),
    _index("a bound too many", BOUNDS, "Q", D + 2, "cut short"),
    _index("a bound too few", BOUNDS, "Q", D, "too long"),
    _index("2**63 bounds", BOUNDS, "Q", 2**63, "cut short"),
]

ENTRIES = [
    _index("first length 0", LENGTHS, "i", 0, "disagree at 1 of 120 sequences, first at sequence 1"),
    _index("first length -1", LENGTHS, "i", -1, "negative lengths at 1 of 120 sequences, first at sequence 0"),
    _index("first length 2**31 - 1", LENGTHS, "i", 2**31 - 1, "disagree"),
    _index("last length -2**31", OFFSETS - 4, "i", -(2**31), "negative lengths .* first at sequence 119"),
    _index("last length one more", OFFSETS - 4, "i", 500, "cut short"),
    _index("first offset not 0", OFFSETS, "q", 2, "disagree .* first at sequence 0"),
    _index("an offset in the middle of an id", OFFSETS + 8 * 5, "q", 33, "disagree at 2 of 120 .* first at sequence 5"),
    _index("an offset beyond the data", OFFSETS + 8 * 5, "q", 2**40, "disagree .* first at sequence 5"),
    _index("an offset of 2**63 - 1", OFFSETS + 8 * 5, "q", 2**63 - 1, "disagree .* first at sequence 5"),
    _index("an offset of -2**63", OFFSETS + 8 * 5, "q", -(2**63), "disagree .* first at sequence 5"),
    _index("a negative last offset", DOCUMENTS - 8, "q", -2, "disagree .* first at sequence 119"),
    _index("first bound not 0", DOCUMENTS, "q", 1, "document bounds go from 1 to 120 instead of from 0"),
    _index("first bound negative", DOCUMENTS, "q", -1, "document bounds go from -1 to 120"),
    _index("a bound before the one before", DOCUMENTS + 8 * 9, "q", 3, "document bounds out of order at 1 of 120"),
    _index("a bound of 2**63 - 1", DOCUMENTS + 8 * 9, "q", 2**63 - 1, "document bounds out of order"),
    _index("a bound of -2**63", DOCUMENTS + 8 * 9, "q", -(2**63), "document bounds out of order"),
    _index("last bound too small", SIZE - 8, "q", D - 1, "document bounds go from 0 to 119"),
    _index("last bound too large", SIZE - 8, "q", D + 1, "document bounds go from 0 to 121"),
]

FILES = [
    _spoilt("code.idx", "a folder", r"code\.idx: no such file"),
    _spoilt("code.bin", "a folder", r"code\.bin: no such file"),
    _spoilt("prose.idx", "longer", r"prose\.idx: too long"),
    _spoilt("prose.bin", "longer", r"prose\.bin: too long"),
    _spoilt("prose.idx", "text", r"prose\.idx: not a Megatron index"),
    _spoilt("code.bin", "cut", r"code\.bin: cut short"),
    _spoilt("code.bin", "text", r"code\.bin: "),
    _case("the two files swapped", _swapped, r"code\.idx: not a Megatron index"),
    _case("the index of another", _of_another("idx"), r"code\.bin: too long"),
    _case("the data of another", _of_another("bin"), r"code\.bin: cut short"),
    _case("no documents", _rewrite(), "data set 'code' .*0 tokens are too few"),
    _case("empty documents", _rewrite([], [], []), "data set 'code' .*0 tokens are too few"),
    _case("a token too few", _rewrite([1] * 32), "data set 'code' .*32 tokens are too few for one sequence of 32"),
    _case("an id beyond the vocabulary", _rewrite([1] * 90, [96]), "data set 'code' .*token id 96 is outside"),
    _case("an id of 16 bits", _rewrite([1] * 90, [65535]), "data set 'code' .*token id 65535 is outside"),
    _case("a negative id", _rewrite([1] * 90, [-1], dtype=np.int32), "data set 'code' .*token id -1 is outside"),
    _case("an id of 63 bits", _rewrite([2**63 - 1] * 90, dtype=np.int64), "token id 9223372036854775807 is outside"),
    _case("float64", _floats(6, np.float64, 3.0), r"code.*float64; token ids are integers"),
    _case("float32, not numbers", _floats(7, np.float32, float("nan")), r"code.*float32; token ids are integers"),
]


def _path(path: str, said: str) -> Case:
    return _case(
        f"path {path[:20]}", lambda world: None, said, phases__0__data__0__path=path, phases__1__data__0__path=path
    )


PATHS = [
    _path("no/such/set", "no/such/set.idx: no such file; a dataset is a pair"),
    _path("/dev/null", "/dev/null.idx: no such file"),
    _path("x" * 300, "x{300}.idx: File name too long"),
    _path("http://host/code", "http://host/code: .*s3://"),
    _path("file:///data/code", "file:///data/code: .*s3://"),
    _path("://", "://: .*s3://"),
    _case(
        "path with its suffix",
        lambda world: None,
        r"code\.bin\.idx: no such file",
        phases=[
            {
                "name": "only",
                "tokens": 512,
                "learning_rate": "constant",
                "data": [{"name": "code", "path": "../data/code.bin", "weight": 1}],
            }
        ],
    ),
]


def _held_out(name: str, harm: Callable[[World], Any], said: str) -> Case:
    def make(world: World) -> list[Any]:
        world.put("data")
        harm(world)
        return world.train(evaluation__data=[{"name": "held", "path": str(world / "data/held_out")}])

    return Case(f"held out, {name}", make, said)


def _short_held_out(world: World) -> None:
    with IndexedWriter(world / "data/held_out", np.uint16) as writer:
        writer.add_document(np.ones(20))


HELD_OUT = [
    _held_out(
        "missing data", lambda world: world.spoil("data/held_out.bin", "missing"), r"held_out\.bin: no such file"
    ),
    _held_out("index cut", lambda world: world.spoil("data/held_out.idx", "cut"), r"held_out\.idx: cut short"),
    _held_out("too short", _short_held_out, "data set 'held' .*20 tokens are too few"),
]


def _command(command: str, how: str, name: str, said: str) -> Case:
    def make(world: World) -> list[Any]:
        _, run, *_ = world.train()
        world.spoil(f"data/{name}", how)
        return ["jetmoe", "data", command, run]

    return Case(f"jetmoe data {command}, {name} {how}", make, said)


COMMANDS = [
    _command("mix", "missing", "prose.idx", r"prose\.idx: no such file"),
    _command("mix", "cut", "prose.idx", r"prose\.idx: cut short"),
    _command("mix", "empty", "prose.idx", r"prose\.idx: not a Megatron index"),
    _command("prepare", "missing", "code.bin", r"code\.bin: no such file"),
    _command("prepare", "cut", "code.bin", r"code\.bin: cut short"),
    _command("prepare", "text", "prose.idx", r"prose\.idx: not a Megatron index"),
    Case(
        "jetmoe data mix, a plot below a file",
        lambda world: ["jetmoe", "data", "mix", world.train()[1], "--plot", world.write("a", "") / "b.png"],
        r"a/b\.png: cannot draw there",
    ),
    Case(
        "jetmoe data mix, a plot of no kind",
        lambda world: ["jetmoe", "data", "mix", world.train()[1], "--plot", world / "plot.exe"],
        r"plot\.exe: cannot draw there",
    ),
]


def _cached(name: str, array: str, harm: Callable[[Path], Any], said: str) -> Case:
    """Of a run that goes on, the cache harmed."""

    def make(world: World) -> list[Any]:
        world.put("run")
        for file in (world / "run/data_index").glob(f"*/{array}.npy"):
            harm(file)
        return world.train()

    return Case(f"cache, {array} {name}", make, said)


def _as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _zeros(dtype: Any, *shape: int) -> Callable[[Path], None]:
    return lambda file: np.save(file, np.zeros(shape, dtype))


def _pickle(file: Path) -> None:
    np.save(file, np.array([Crafted(file.parent / "witness")], object), allow_pickle=True)


CACHE = [
    _cached("missing", "data_set", lambda file: file.unlink(), r"data\.cache: .*data_set\.npy"),
    _cached("empty", "place", lambda file: file.write_bytes(b""), r"data\.cache: .*place\.npy is damaged"),
    _cached("cut", "sample_index", lambda file: os.truncate(file, 140), r"data\.cache: .*sample_index\.npy is damaged"),
    _cached("a folder", "shuffle_index", _as_folder, r"data\.cache: .*shuffle_index\.npy is damaged"),
    _cached("an array of pickles", "data_set", _pickle, r"data\.cache: .*data_set\.npy is damaged"),
    _cached(
        "a pickle",
        "place",
        lambda file: file.write_bytes(pickle.dumps(Crafted(file.parent / "witness"))),
        r"data\.cache: .*place\.npy is damaged",
    ),
    _cached("too short", "data_set", _zeros(np.int16, 3), r"data\.cache: .*data_set\.npy is damaged"),
    _cached("of another type", "place", _zeros(np.float32, 40), r"data\.cache: .*place\.npy is damaged"),
    _cached("too short", "document_index", _zeros(np.int32, 3), r"data\.cache: .*document_index\.npy is damaged"),
    _cached("of one axis", "sample_index", _zeros(np.int32, 30), r"data\.cache: .*sample_index\.npy is damaged"),
    _cached("too short", "shuffle_index", _zeros(np.uint32, 2), r"data\.cache: .*shuffle_index\.npy is damaged"),
]

CASES = [*TRUNCATED, *HEADERS, *ENTRIES, *FILES, *PATHS, *HELD_OUT, *COMMANDS, *CACHE]
