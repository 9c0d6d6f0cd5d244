"""What `inspect` says of datasets that others made, sound and damaged."""

import json
import random
import statistics
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools import indexed
from data_tools.errors import InputError
from data_tools.indexed import read_index, write_index
from data_tools.inspect import inspect
from data_tools.printing import printable_lines
from data_tools.tokenizer import load_tokenizer
from tests.data_tools.datasets import SENTENCES, Documents, by_hand, by_megatron, parse, random_documents

Command = Callable[..., tuple[int, str, str]]
REPOSITORY = Path(__file__).parents[2]
VOCABULARY = 400
FUZZED = 300


@pytest.mark.parametrize("make", [by_hand, by_megatron])
@pytest.mark.parametrize("chunk", [2, 1 << 20])
def test_the_numbers_are_those_of_the_documents(
    tmp_path: Path, make: Callable[..., Path], chunk: int, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    for documents in (SENTENCES, random_documents(100, 5), [[[1]], [[1, 2, 2, 2]]]):  # medians of odd and even numbers
        prefix = make(tmp_path / "in", documents)
        lengths = [sum(map(len, document)) for document in documents]
        status, out, err = command("inspect", prefix, "--json")
        assert (status, err) == (0, "")
        said = json.loads(out)
        assert (said["documents"], said["sequences"]) == (len(documents), sum(map(len, documents)))
        assert (said["tokens"], said["dtype"], said["bin_bytes"]) == (sum(lengths), "uint16", 2 * sum(lengths))
        assert said["idx_bytes"] == (tmp_path / "in.idx").stat().st_size
        said = said["tokens_per_document"]
        bins = said.pop("histogram")
        assert said == {
            "min": min(lengths),
            "median": statistics.median_low(lengths),
            "mean": statistics.mean(lengths),
            "max": max(lengths),
        }
        assert [b["documents"] for b in bins] == [sum(b["low"] <= n <= b["high"] for n in lengths) for b in bins]
        assert sum(b["documents"] for b in bins) == len(lengths)
        edges = [(b["low"], b["high"]) for b in bins]
        assert (
            edges
            == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127)][
                min(lengths).bit_length() : max(lengths).bit_length() + 1
            ]
        )


def test_the_table(tmp_path: Path, command: Command) -> None:
    documents = [[[i] * 3] for i in range(1600)] + [[[1] * 9]] * 20
    assert command("inspect", by_hand(tmp_path / "in", documents)) == (
        0,
        f"""{tmp_path / "in"}
  documents  1,620
  sequences  1,620
  tokens     4,980
  dtype      uint16
  .bin       9,960 bytes
  .idx       32,442 bytes

tokens per document
  min        3
  median     3
  mean       3.1
  max        9

   2 - 3           1,600 {"#" * 40}
   4 - 7               0
  8 - 15              20 #
""",
        "",
    )


def test_a_dataset_without_documents(tmp_path: Path, command: Command) -> None:
    prefix = by_hand(tmp_path / "in", [])
    status, out, err = command("inspect", prefix, "--check")
    assert (status, err) == (0, "") and "documents  0\n" in out and "check: index and data agree" in out
    status, out, _ = command("inspect", prefix, "--json")
    assert status == 0 and json.loads(out)["tokens_per_document"] == {"histogram": []}


@pytest.fixture
def encoded(tmp_path: Path, tokenizer_dir: Path, texts: list[str]) -> Path:
    """Each text a document of two sequences, the end of document in the second."""
    tokenizer, eod = load_tokenizer(tokenizer_dir)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return by_megatron(tmp_path / "in", [[document[:3], [*document[3:], eod]] for document in ids])


def test_any_document_is_decoded(encoded: Path, tokenizer_dir: Path, texts: list[str], command: Command) -> None:
    for number, text in enumerate(texts):
        for name in (number, number - len(texts)):
            options = ("--document", str(name), "--tokenizer", tokenizer_dir)
            status, out, err = command("inspect", encoded, *options, "--json")
            document = json.loads(out)["document"]
            assert (status, err) == (0, "")
            assert (document["number"], document["text"]) == (number, f"{text}</s>")
            lengths = [len(sequence) for sequence in (parse(encoded) or [])[number]]
            assert document["sequences"] == lengths
            status, out, err = command("inspect", encoded, *options)
            assert (status, err) == (0, "")
            shown = printable_lines(text)  # what could act on the terminal is spelled out
            assert out == f"document {number}: {lengths[0]} + {lengths[1]} tokens\n\n{shown}</s>\n"


def test_documents_that_cannot_be_decoded(tmp_path: Path, tokenizer_dir: Path, command: Command) -> None:
    prefix = by_hand(tmp_path / "in", [[[1, 2]], [[400, 2]], [[]]])
    by_hand(tmp_path / "negative", [[[-1, 5]]], code=4)

    def refused(message: str, *options: str | Path) -> None:
        status, out, err = command("inspect", *options)
        assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
        assert message in err

    refused("needs its tokenizer: pass --tokenizer DIR", prefix, "--document", "0")
    decode = ("--tokenizer", tokenizer_dir, "--document")
    refused("no document 3; it has 3, counted from 0", prefix, *decode, "3")
    refused("no document -4; it has 3, counted from 0", prefix, *decode, "-4")
    refused("document 1 holds ids from 2 to 400, the vocabulary of ", prefix, *decode, "1")
    refused("document 0 holds ids from -1 to 5", tmp_path / "negative", *decode, "0")
    refused("tokenizer.json: no such file", prefix, "--tokenizer", tmp_path, "--document", "0")
    assert command("inspect", prefix, *decode, "2") == (0, "document 2: 0 tokens\n\n\n", "")


def test_a_terminal_without_unicode_and_a_pipe_that_closes(encoded: Path, tokenizer_dir: Path) -> None:
    command = f"{sys.executable} -m data_tools inspect {encoded} --tokenizer {tokenizer_dir} --document 2"
    for tail, environment, expected in (("", {"PYTHONIOENCODING": "ascii"}, "Gr\\xfc\\xdfe"), ("| true", {}, "")):
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command + tail],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={"PATH": "/usr/bin:/bin", **environment},
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout


def test_check_says_what_it_checked(tmp_path: Path, tokenizer_dir: Path, command: Command) -> None:
    prefix = by_megatron(tmp_path / "in", random_documents(50, 6, VOCABULARY))
    status, out, err = command("inspect", prefix, "--check", "--tokenizer", tokenizer_dir)
    assert (status, err) == (0, "") and out.endswith("\ncheck: index and data agree; all ids below 400\n")
    status, out, err = command("inspect", prefix, "--check")
    assert (status, err) == (0, "") and "ids not compared with a vocabulary" in out
    said = json.loads(command("inspect", prefix, "--check", "--json")[1])
    assert said["check"] == {"problems": [], "warnings": []}


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_ids_outside_the_vocabulary_and_odd_documents(
    tmp_path: Path, tokenizer_dir: Path, chunk: int, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    documents: Documents = [[[5, 2]], [[], [6, 2]], [[]], [[7, 399], [8, 400, 2]], [[9]], [[401, 402]], [[]]]
    prefix = by_hand(tmp_path / "in", documents, code=4)
    data = tmp_path / "in.bin"
    status, out, err = command("inspect", prefix, "--check", "--tokenizer", tokenizer_dir)
    assert (status, out) == (2, "")
    assert err.splitlines() == [
        f"warning: {data}: 2 of 7 documents do not end with the end-of-document token, id 2, the first is document 4",
        f"warning: {data}: 2 of 7 documents have no tokens, the first is document 2",
        f"error: {data}: 3 of 12 token ids are outside the vocabulary of 400, the first, 400, in document 3 (token 7)",
    ]
    status, out, _ = command("inspect", prefix, "--check", "--tokenizer", tokenizer_dir, "--json")
    assert status == 2 and len(json.loads(out)["check"]["problems"]) == 1

    status, out, err = command("inspect", prefix, "--check")
    assert status == 0 and err.count("\n") == 1 and "2 of 7 documents have no tokens" in err
    by_hand(tmp_path / "in", [[[5, 2]], [[-3, -4, 2]]], code=4)
    status, out, err = command("inspect", prefix, "--check")
    assert status == 2 and "2 of 5 token ids are outside any vocabulary, the first, -3, in document 1 (token 2)" in err


def test_every_kind_of_damage_has_its_line(tmp_path: Path, command: Command) -> None:
    prefix = by_hand(tmp_path / "in", SENTENCES)
    index = bytearray((tmp_path / "in.idx").read_bytes())
    sequences = sum(map(len, SENTENCES))
    struct.pack_into("<i", index, 34 + 4 * 2, -3)
    struct.pack_into("<q", index, 34 + 4 * sequences + 8 * 5, 1)
    struct.pack_into("<3q", index, 34 + 12 * sequences, 1, 9, 4)
    (tmp_path / "in.idx").write_bytes(index)
    status, out, err = command("inspect", prefix, "--check")
    assert (status, out) == (2, "")
    path, data = tmp_path / "in.idx", tmp_path / "in.bin"
    assert err.splitlines() == [
        f"error: {path}: negative lengths at 1 of 9 sequences, first at sequence 2",
        f"error: {path}: sequence lengths and byte offsets disagree at 3 of 9 sequences, first at sequence 3",
        f"error: {path}: document bounds out of order at 1 of 5 documents, first at document 2",
        f"error: {path}: document bounds go from 1 to 9 instead of from 0 to 9, all sequences",
        f"error: {data}: too long, 28 bytes instead of 16 for the 8 tokens of its index",
    ]
    assert json.loads(command("inspect", prefix, "--check", "--json")[1])["check"]["problems"] == [
        line.removeprefix("error: ") for line in err.splitlines()
    ]
    status, out, err = command("inspect", prefix)  # without --check the first is enough
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_floats_are_no_token_ids(tmp_path: Path, command: Command) -> None:
    by_hand(tmp_path / "in", SENTENCES, code=4)
    with open(tmp_path / "in.idx", "r+b") as stream:
        stream.seek(17)
        stream.write(b"\x07")
    status, _, err = command("inspect", tmp_path / "in", "--check")
    assert status == 2 and "holds float32; token ids are integers" in err


def test_missing_and_unreadable(tmp_path: Path, command: Command) -> None:
    (tmp_path / "folder.idx").mkdir()
    (tmp_path / "folder.bin").touch()
    for name in ("missing", "folder"):
        for options in ((), ("--check",)):
            status, out, err = command("inspect", tmp_path / name, *options)
            assert (status, out) == (2, "") and f"{name}.idx: no such file" in err and err.count("\n") == 1
        status, out, _ = command("inspect", tmp_path / name, "--check", "--json")
        assert status == 2 and f"{name}.idx: no such file" in json.loads(out)["check"]["problems"][0]


def damage(source: random.Random, index: bytearray, data: bytearray) -> None:
    """One thing that disks, copies and bugs do to a file."""
    target = source.choice([index, index, data])
    kind = source.choice(["cut", "flip", "flip", "extend", "zeros", "count", "swap"])
    place = source.randrange(len(target))
    if kind == "cut":
        del target[place:]
    elif kind == "flip":
        target[place] ^= 1 << source.randrange(8)
    elif kind == "extend":
        target += source.randbytes(source.randrange(1, 40))
    elif kind == "zeros":
        size = min(source.randrange(1, 64), len(target) - place)
        target[place : place + size] = bytes(size)
    elif kind == "count":  # of sequences or bounds: huge, near, and such that sizes overflow 64 bits
        count = source.choice([0, 1, 29, 2**31, 2**40, 2**61, 2**62, 2**63, 2**64 - 1, source.getrandbits(64)])
        struct.pack_into("<Q", index, source.choice([18, 26]), count)
    else:
        other = source.randrange(len(target))
        target[place], target[other] = target[other], target[place]


@pytest.mark.parametrize("seed", range(3))
def test_damage_is_found_exactly_where_there_is_any(
    tmp_path: Path, tokenizer_dir: Path, seed: int, command: Command
) -> None:
    """Damaged at random, against a reading field by field: clear lines and status 2, or a dataset that is sound.

    Memory stays small, whatever counts a header claims.
    """
    verdicts = []
    for i in range(seed * FUZZED // 3, (seed + 1) * FUZZED // 3):
        source = random.Random(i)
        prefix = by_hand(tmp_path / f"{i}", random_documents(30, i, VOCABULARY), code=source.choice([8, 4]))
        paths = [Path(f"{prefix}.idx"), Path(f"{prefix}.bin")]
        index, data = (bytearray(path.read_bytes()) for path in paths)
        damage(source, index, data)
        paths[0].write_bytes(index)
        paths[1].write_bytes(data)

        documents = parse(prefix)
        ids = [i for document in documents or [] for sequence in document for i in sequence]
        sound = documents is not None and all(0 <= i < VOCABULARY for i in ids)
        tracemalloc.start()
        try:
            status, out, err = command("inspect", prefix, "--check", "--tokenizer", tokenizer_dir)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert status == (0 if sound else 2), (i, out, err)
        assert peak < 8e6
        errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert bool(errors) == (not sound)
        assert all(line.startswith(f"error: {prefix}.") for line in errors) and len(errors) <= 5
        if documents is None:
            with pytest.raises(InputError):
                read_index(prefix)
        else:
            assert read_index(prefix).tokens == len(ids)
        verdicts.append(sound)
    assert 5 < sum(verdicts) < len(verdicts) - 50  # the damage is neither always harmless nor always fatal


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a million documents, whose index has 20 MB."""
    monkeypatch.setattr(indexed, "_CHUNK", 1 << 14)
    lengths = np.random.default_rng(0).integers(1, 100, 1_000_000, np.int32)
    with open(tmp_path / "in.idx", "wb") as stream:
        write_index(stream, np.dtype(np.uint8), lengths)
    with open(tmp_path / "in.bin", "wb") as stream:
        stream.truncate(int(lengths.sum()))
    tracemalloc.start()
    try:
        report = inspect(tmp_path / "in", check=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6
    assert report.summary is not None and report.summary.tokens == lengths.sum()
    assert report.summary.statistics()["median"] == np.sort(lengths)[(len(lengths) - 1) // 2]
