"""`jetmoe data` tokenize, tokenizer, merge, split and inspect."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from typing import Any

from tests.malformed.world import LONG, Case, Harm, World, given, spoilt, written

# tokenize, and tokenizer, of texts


def _texts(name: str, file: str, content: bytes, said: str) -> tuple[Case, Case]:
    def tokenize(world: World) -> list[Any]:
        world.put("tokenizer").write(f"in/{file}", content)
        command = ["jetmoe", "data", "tokenize", world / "in" / file]
        return [*command, "--output", world / "set", "--tokenizer", world / "tokenizer"]

    def train(world: World) -> list[Any]:
        world.write(f"in/{file}", content)
        command = ["jetmoe", "data", "tokenizer", world / "in" / file]
        return [*command, "--output", world / "out", "--vocab-size", 300]

    return Case(f"tokenize, {name}", tokenize, said), Case(f"tokenizer, {name}", train, said)


def _line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


TEXTS = [
    case
    for pair in (
        _texts("UTF-16", "a.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"a\.jsonl:1: not valid"),
        _texts("text for JSON", "a.jsonl", b"once upon a time\n", r"a\.jsonl:1: not valid JSON"),
        _texts("a line cut", "a.jsonl", _line("a") + b'{"text": "b', r"a\.jsonl:2: not valid JSON"),
        _texts("a list per line", "a.jsonl", b'["a"]\n', r"a\.jsonl:1: the line is a list"),
        _texts("a text of numbers", "a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: the value of 'text' is a number"),
        _texts("two values", "a.jsonl", b'{"text": "a", "text": "b"}\n', r"a\.jsonl:1: 2 values of the key 'text'"),
        _texts("a line deeply nested", "a.jsonl", b"[" * 200_000 + b"\n", r"a\.jsonl:1: not usable JSON"),
        _texts("a zero-length gzip", "a.jsonl.gz", gzip.compress(b""), r"a\.jsonl\.gz: the file is empty"),
        _texts("a gzip cut", "a.jsonl.gz", gzip.compress(_line("abc") * 9)[:-9], r"a\.jsonl\.gz:\d+: the gzip stream"),
        _texts("Zstandard of nothing", "a.jsonl.zst", b"\x28\xb5\x2f\xfd\xff\xff", r"a\.jsonl\.zst:1: the zstd stream"),
        _texts("Parquet of text", "a.parquet", b"PAR1 not really PAR1", r"a\.parquet: not readable as Parquet"),
        _texts("Parquet of nothing", "a.parquet", b"", r"a\.parquet: "),
        _texts("Latin-1", "a.txt", "Läuft".encode("latin-1"), r"a\.txt:1: not valid UTF-8"),
    )
    for case in pair
]


def _tokenize(name: str, said: str, *options: Any, also: Any = (), harm: Harm = lambda world: None) -> Case:
    """options: the last one of a name counts. also: one more input. Both may be functions of the world."""

    def make(world: World) -> list[Any]:
        world.put("tokenizer", "corpus")
        harm(world)
        command = ["jetmoe", "data", "tokenize", world / "corpus", *given(world, [also] if also else [])]
        command += ["--output", world / "set", "--tokenizer", world / "tokenizer"]
        return [*command, *given(world, options)]

    return Case(f"tokenize, {name}", make, said)


def _partial(**files: Any) -> Harm:
    """What an earlier run seems to have left."""

    def make(world: World) -> None:
        for name, content in files.items():
            world.write(f"set.partial/{name}", content)
        world.write("set.partial/lock", "")

    return make


def _state(**changes: Any) -> Harm:
    """A state as an earlier run with the same settings leaves it, but for the changes."""

    def make(world: World) -> None:
        from dataclasses import asdict

        from data_tools import shards
        from data_tools.engines import open_reference
        from data_tools.inputs import find_files
        from data_tools.partial import State
        from data_tools.tokenize import _identity

        settings = {
            "format": 1,
            "tokenizer": open_reference(world / "tokenizer").digest,
            "text_key": "text",
            "engine": "auto",
            "append_eod": True,
            "shard_bytes": shards.SHARD_BYTES,
            "inputs": [_identity(path) for path in find_files([world / "corpus"])],
        }
        state = {**asdict(State(shards=1)), **changes}
        empty = dict.fromkeys(("bin", "lengths", "skipped"), "")
        _partial(**{"settings.json": settings, "state.json": state}, **empty)(world)

    return make


TOKENIZE = [
    _tokenize("an input that is not there", "no/such: no such file or folder", also=lambda world: world / "no/such"),
    _tokenize("an empty folder", "tmp: no .jsonl", also=lambda world: world / "tmp"),
    _tokenize("an input twice", r"a\.jsonl: named twice", also=lambda world: world / "corpus/a.jsonl"),
    _tokenize("a device", "/dev/zero: not a file on a disk", also="/dev/zero"),
    _tokenize("a name too long", "x{300}: .*File name too long", also=LONG),
    _tokenize("a pattern of nothing", r"\*\.csv: no such file", also="*.csv"),
    _tokenize("an output below a file", "cannot write ", "--output", lambda world: world.write("f", "") / "set"),
    _tokenize("an output that is a folder", "names no file", "--output", lambda world: f"{world / 'tmp'}/"),
    _tokenize("an output too long", "x{300}.*File name too long", "--output", lambda world: world / LONG),
    _tokenize("an output that exists", r"one\.bin exists", "--output", lambda w: w.put("encoded") / "encoded/one"),
    _tokenize("no workers", "workers is 0", "--workers", "0"),
    _tokenize("workers of text", "argument --workers: invalid int value", "--workers", "many"),
    _tokenize("an unknown engine", "argument --engine: invalid choice", "--engine", "fast"),
    _tokenize("another key", "no key 'content'", "--text-key", "content"),
    _tokenize("a tokenizer that is not there", "no/such/tokenizer.json: no such file", "--tokenizer", "no/such"),
    _tokenize("a partial that is a file", "set.partial", harm=written("set.partial", "x")),
    _tokenize(
        "a partial of another program",
        "set.partial/notes.txt is not a file of this",
        harm=_partial(**{"notes.txt": ""}),
    ),
    _tokenize("a state of text", "set.partial: cannot be read; delete it", harm=_partial(**{"state.json": "text"})),
    _tokenize("a state of a list", "set.partial: cannot be read; delete it", harm=_partial(**{"state.json": []})),
    _tokenize(
        "a state deeply nested",
        "set.partial: cannot be read; delete it",
        harm=_partial(**{"state.json": "[" * 100_000}),
    ),
    _tokenize("a state with documents of text", "set.partial: cannot be read; delete", harm=_state(documents="many")),
    _tokenize("a state with negative shards", "set.partial: cannot be read; delete", harm=_state(shards=-1)),
    _tokenize("a state with an unknown key", "set.partial: cannot be read; delete", harm=_state(extra=1)),
    _tokenize("a state of another engine", "set.partial: cannot be read; delete", harm=_state(engine="quick")),
    _tokenize("a state of more than there is", "set.partial/bin: 0 bytes instead of", harm=_state(tokens=99)),
]


def _tokenizer(name: str, said: str, *options: Any, source: str = "corpus") -> Case:
    def make(world: World) -> list[Any]:
        world.put("corpus")
        command = ["jetmoe", "data", "tokenizer", world / source, "--output", world / "out", "--vocab-size", "300"]
        return [*command, *given(world, options)]

    return Case(f"tokenizer, {name}", make, said)


TOKENIZER = [
    _tokenizer("too small", "vocab_size is 10; it must be at least 259", "--vocab-size", "10"),
    _tokenizer("too large", "vocab_size is 16777217; it must be at most 16777216", "--vocab-size", "16777217"),
    _tokenizer("a negative size", "vocab_size is -5; it must be", "--vocab-size", "-5"),
    _tokenizer("a size of text", "argument --vocab-size: invalid int value", "--vocab-size", "32k"),
    _tokenizer("an output that exists", "tmp exists; choose another output", "--output", lambda world: world / "tmp"),
    _tokenizer(
        "an output below a file", "cannot write .*f/out", "--output", lambda world: world.write("f", "") / "out"
    ),
    _tokenizer("an output over a file", "f", "--overwrite", "--output", lambda world: world.write("f", "")),
    _tokenizer("an output too long", "x{300}.*File name too long", "--output", lambda world: world / LONG),
    _tokenizer("an input that is not there", "no/such: no such file", source="no/such"),
]


# merge, split, inspect


def _sets(name: str, arguments: Callable[[World], list[Any]], said: str, harm: Harm = lambda world: None) -> Case:
    def make(world: World) -> list[Any]:
        world.put("encoded")
        harm(world)
        return ["jetmoe", "data", *arguments(world)]

    return Case(name, make, said)


def _merge(world: World, *more: Any) -> list[Any]:
    return ["merge", world / "encoded/one", world / "encoded/two", *more, "--output", world / "set"]


def _split(world: World, *more: Any) -> list[Any]:
    outputs = ["--train", world / "train", "--held-out", world / "held"]
    return ["split", world / "encoded/one", *outputs, "--fraction", "0.5", *more]


def _inspect(world: World, *more: Any) -> list[Any]:
    return ["inspect", world / "encoded/one", *more]


def _headed(code: int) -> Harm:
    """The dtype alone is another."""
    return lambda world: world.patch("encoded/one.idx", 17, bytes([code]))


def _of_floats(world: World) -> None:
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 7, 4, 5)
    index += struct.pack("<4i4q5q", *[8] * 4, *range(0, 128, 32), *range(5))
    world.write("encoded/one.idx", index)
    world.write("encoded/one.bin", struct.pack("<32f", *range(32)))


SETS = [
    *(
        _sets(f"{tool.__name__[1:]}, {file} {how}", tool, rf"one\.{file}: {said}", spoilt(f"encoded/one.{file}", how))
        for tool in (_merge, _split, _inspect)
        for file, how, said in (
            ("idx", "cut", "cut short"),
            ("idx", "a folder", "no such file"),
            ("idx", "text", "not a Megatron index"),
            ("bin", "missing", "no such file"),
            ("bin", "cut", "cut short"),
            ("bin", "longer", "too long"),
        )
    ),
    *(
        _sets(f"{tool.__name__[1:]}, floats", tool, "one.* float32; token ids are integers", _of_floats)
        for tool in (_merge, _split, _inspect)
    ),
    _sets("merge, dtype unknown", _merge, r"one\.idx: version 1 with dtype code 99", _headed(99)),
    _sets("merge, a set twice", lambda w: _merge(w, w / "encoded/one"), "one: named twice"),
    _sets("merge, an output that is an input", lambda w: [*_merge(w), "--output", w / "encoded/two"], "both an input"),
    _sets("merge, an output below a file", lambda w: [*_merge(w), "--output", w.write("f", "") / "a"], "cannot write "),
    _sets("merge, a name too long", lambda w: [*_merge(w), "--output", w / LONG], "x{300}.*File name too long"),
    _sets("merge, an input too long", lambda w: _merge(w, w / LONG), "x{300}.*File name too long"),
    _sets("split, a fraction of text", lambda w: _split(w, "--fraction", "half"), "--fraction: invalid float value"),
    _sets("split, a fraction of 5", lambda w: _split(w, "--fraction", "5"), "fraction is 5.0; it must lie between"),
    _sets("split, an infinite fraction", lambda w: _split(w, "--fraction", "inf"), "fraction is inf; it must lie"),
    _sets("split, a seed of text", lambda w: _split(w, "--seed", "x"), "--seed: invalid int value"),
    _sets("split, a huge seed", lambda w: _split(w, "--seed", "9" * 40), "seed is 9{40}; it must lie between"),
    _sets("split, an output below a file", lambda w: _split(w, "--train", w.write("f", "") / "a"), "cannot write "),
    _sets("split, one output for both", lambda w: _split(w, "--train", w / "held"), "held: named for both sides"),
    _sets(
        "inspect, a document beyond",
        lambda w: _inspect(w.put("tokenizer"), "--document", "99999", "--tokenizer", w / "tokenizer"),
        "no document 99999",
    ),
    _sets("inspect, object storage", lambda w: ["inspect", "s3://bucket/set"], "s3://bucket/set: only training reads"),
    _sets("inspect, no tokenizer", lambda w: _inspect(w, "--document", "0"), "pass --tokenizer DIR"),
    _sets(
        "inspect, --check of a cut index",
        lambda w: _inspect(w, "--check"),
        "cut short",
        spoilt("encoded/one.idx", "cut"),
    ),
    _sets("inspect, a prefix too long", lambda w: ["inspect", w / LONG], "x{300}.*File name too long"),
]

CASES = [*TEXTS, *TOKENIZE, *TOKENIZER, *SETS]
