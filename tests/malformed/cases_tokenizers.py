"""Tokenizers that are given to a run, to `jetmoe data tokenize` and to `jetmoe convert to-hf`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.malformed.world import Case, Harm, World, spoilt, written

FILE = "tokenizer/tokenizer.json"
CONFIG = "tokenizer/tokenizer_config.json"
REMOTE = "import os\nos.mkdir({witness!r})\n\n\nclass Foreign:\n    pass\n"


def _vocab(edit: Callable[[dict[str, Any]], Any]) -> Harm:
    return lambda world: world.edit_json(FILE, lambda content: edit(content["model"]["vocab"]) and None)


def _configured(**changes: Any) -> Harm:
    def edit(world: World) -> None:
        for file in (CONFIG, "tokenizer/special_tokens_map.json"):
            world.edit_json(file, lambda content: content.update(changes))

    return edit


def _remote(world: World) -> None:
    """Code that a loader which trusts it would run. The tokenizer needs it: there is no class of that name."""
    world.edit_json(
        CONFIG,
        lambda content: content.update(
            tokenizer_class="Foreign", auto_map={"AutoTokenizer": ["tokenization_foreign.Foreign", None]}
        ),
    )
    world.write("tokenizer/tokenization_foreign.py", REMOTE.format(witness=str(world / "witness")))


def _no_eos(world: World) -> None:
    for file in (CONFIG, "tokenizer/special_tokens_map.json"):
        world.edit_json(file, lambda content: content.pop("eos_token") and None)


# What is wrong with a folder whatever reads it: (name, harm, what the line names).
FOLDERS: list[tuple[str, Harm, str]] = [
    ("tokenizer.json missing", spoilt(FILE, "missing"), r"tokenizer\.json: no such file"),
    ("tokenizer.json a folder", spoilt(FILE, "a folder"), r"tokenizer\.json: "),
    ("tokenizer.json empty", spoilt(FILE, "empty"), r"tokenizer\.json: not a tokenizer"),
    ("tokenizer.json cut", spoilt(FILE, "cut"), r"tokenizer\.json: not a tokenizer"),
    ("tokenizer.json text", spoilt(FILE, "text"), r"tokenizer\.json: not a tokenizer"),
    ("tokenizer.json binary", written(FILE, bytes(range(256))), r"tokenizer\.json: not a tokenizer"),
    ("tokenizer.json {}", written(FILE, "{}"), r"tokenizer\.json: not a tokenizer"),
    ("tokenizer.json []", written(FILE, "[]"), r"tokenizer\.json: not a tokenizer"),
    ("tokenizer.json null", written(FILE, "null"), r"tokenizer\.json: not a tokenizer"),
    ("tokenizer.json deeply nested", written(FILE, "[" * 100_000), r"tokenizer\.json: not a tokenizer"),
    (
        "a model of no kind",
        written(FILE, {"model": {"type": "None", "vocab": {}}}),
        r"tokenizer\.json: not a tokenizer",
    ),
    (
        "a negative id",
        lambda world: world.edit_json(FILE, lambda content: content["model"]["vocab"].update(x=-1)),
        r"tokenizer\.json: not a tokenizer",
    ),
    (
        "an id that is text",
        lambda world: world.edit_json(FILE, lambda content: content["model"]["vocab"].update(x="7")),
        r"tokenizer\.json: not a tokenizer",
    ),
    (
        "an id of 60 bits",
        lambda world: world.edit_json(FILE, lambda content: content["model"]["vocab"].update(x=2**60)),
        r"tokenizer\.json: not a tokenizer",
    ),
    (
        "merges of unknown tokens",
        lambda world: world.edit_json(FILE, lambda content: content["model"].update(merges=[["qq", "zz"]])),
        r"tokenizer\.json: not a tokenizer",
    ),
    (
        "an empty vocabulary",
        lambda world: world.edit_json(
            FILE, lambda content: content["model"].update(vocab={}, merges=[]) or content.update(added_tokens=[])
        ),
        "tokenizer",
    ),
    (
        "added tokens of text",
        lambda world: world.edit_json(FILE, lambda content: content.update(added_tokens=["</s>"])),
        r"tokenizer\.json: not a tokenizer",
    ),
    ("tokenizer_config.json binary", written(CONFIG, bytes(range(256))), r"tokenizer_config\.json: not a JSON object"),
    ("tokenizer_config.json a number", written(CONFIG, "7"), r"tokenizer_config\.json: not a JSON object"),
    ("tokenizer_config.json deeply nested", written(CONFIG, "[" * 100_000), r"tokenizer_config\.json: not a JSON"),
    ("no eos_token", _no_eos, "names an eos_token"),
    ("eos_token a number", _configured(eos_token=2), "names an eos_token"),
    ("eos_token unknown", _configured(eos_token="<gone>"), "eos token '<gone>' is not in its vocabulary"),
    ("eos_token a list", _configured(eos_token=["</s>"]), "names an eos_token"),
]


def _in_a_run(name: str, harm: Harm, said: str) -> Case:
    def make(world: World) -> list[Any]:
        world.put("tokenizer")
        harm(world)
        return world.train(tokenizer=str(world / "tokenizer"), model__vocab_size=300)

    return Case(f"run, {name}", make, said)


def _tokenizing(name: str, harm: Harm, said: str) -> Case:
    def make(world: World) -> list[Any]:
        world.put("tokenizer", "corpus")
        harm(world)
        inputs = ["jetmoe", "data", "tokenize", world / "corpus"]
        return [*inputs, "--output", world / "set", "--tokenizer", world / "tokenizer"]

    return Case(f"tokenize, {name}", make, said)


def _sentencepiece(name: str, harm: Harm, said: str) -> tuple[Case, Case]:
    def in_a_run(world: World) -> list[Any]:
        world.put("sentencepiece")
        harm(world)
        return world.train(tokenizer=str(world / "sentencepiece"))

    def tokenizing(world: World) -> list[Any]:
        world.put("sentencepiece", "corpus")
        harm(world)
        model = world / "sentencepiece/tokenizer.model"
        return ["data_tools", "tokenize", world / "corpus", "--output", world / "set", "--tokenizer", model]

    return Case(f"run, SentencePiece {name}", in_a_run, said), Case(f"tokenize, SentencePiece {name}", tokenizing, said)


MODEL = "sentencepiece/tokenizer.model"
SENTENCEPIECE = [
    case
    for pair in (
        _sentencepiece("empty", spoilt(MODEL, "empty"), r"tokenizer\.model: "),
        _sentencepiece("cut", spoilt(MODEL, "cut"), r"tokenizer\.model: not a SentencePiece model"),
        _sentencepiece("text", spoilt(MODEL, "text"), r"tokenizer\.model: not a SentencePiece model"),
        _sentencepiece("a folder", spoilt(MODEL, "a folder"), "tokenizer"),
        _sentencepiece("missing", spoilt(MODEL, "missing"), "tokenizer"),
    )
    for case in pair
]


def _exporting(name: str, harm: Harm, said: str) -> Case:
    def make(world: World) -> list[Any]:
        world.put("run", "tokenizer")
        harm(world)
        checkpoint = world / "run/checkpoints/tokens_1024"
        return ["jetmoe", "convert", "to-hf", checkpoint, world / "out", "--tokenizer", world / "tokenizer"]

    return Case(f"to-hf, {name}", make, said)


def _special(token: Any) -> Harm:
    return lambda world: world.write("tokenizer/config.json", json.dumps({"eos_token_id": token}))


EXPORTS = [
    _exporting("tokenizer.json cut", spoilt(FILE, "cut"), r"/tokenizer: "),
    _exporting("tokenizer.json {}", written(FILE, "{}"), r"/tokenizer: "),
    _exporting("tokenizer.json binary", written(FILE, bytes(range(256))), r"/tokenizer: "),
    _exporting("tokenizer.json missing", spoilt(FILE, "missing"), r"/tokenizer: "),
    _exporting("tokenizer.json a folder", spoilt(FILE, "a folder"), r"/tokenizer"),
    _exporting("tokenizer_config.json text", spoilt(CONFIG, "text"), r"/tokenizer: "),
    _exporting("tokenizer_config.json a list", written(CONFIG, "[]"), r"/tokenizer: "),
    _exporting("remote code", _remote, r"/tokenizer: "),
    _exporting("config.json text", written("tokenizer/config.json", "text"), r"tokenizer/config\.json: not valid JSON"),
    _exporting("config.json a list", written("tokenizer/config.json", "[]"), r"tokenizer/config\.json: must hold"),
    _exporting("eos_token_id text", _special("two"), r"tokenizer/config\.json: eos_token_id"),
    _exporting("eos_token_id an object", _special({"a": 1}), r"tokenizer/config\.json: eos_token_id"),
    _exporting("eos_token_id negative", _special(-1), r"tokenizer/config\.json: eos_token_id"),
    _exporting("eos_token_id a fraction", _special(2.5), r"tokenizer/config\.json: eos_token_id"),
]


def _run_with(name: str, make: Callable[[World], list[Any]], said: str) -> Case:
    return Case(f"run, {name}", make, said)


def _small_vocabulary(world: World) -> list[Any]:
    world.put("tokenizer")
    return world.train(tokenizer=str(world / "tokenizer"), model__vocab_size=256)


def _small_vocabulary_of_sentencepiece(world: World) -> list[Any]:
    world.put("sentencepiece")
    return world.train(tokenizer=str(world / "sentencepiece"), model__vocab_size=24)


def _unigram(world: World) -> list[Any]:
    """Its vocabulary is a list."""
    from tokenizers import Tokenizer, models

    world.put("tokenizer")
    model = models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((f"t{i}", -1.0) for i in range(200))], unk_id=0)
    Tokenizer(model).save(str(world / FILE))
    return world.train(tokenizer=str(world / "tokenizer"))


RUNS = [
    _run_with("no such folder", lambda world: world.train(tokenizer="no/such"), "tokenizer: no/such"),
    _run_with("a file", lambda world: world.train(tokenizer=str(world.write("file", "x"))), "tokenizer: .*file"),
    _run_with(
        "a data folder", lambda world: world.put("data").train(tokenizer=str(world / "data")), "data/tokenizer.json"
    ),
    _run_with("more tokens than the model", _small_vocabulary, r"300 tokens, more than model.vocab_size \(256\)"),
    _run_with(
        "a SentencePiece of more", _small_vocabulary_of_sentencepiece, r"40 tokens, more than model.vocab_size \(24\)"
    ),
    _run_with("a Unigram of more", _unigram, r"202 tokens, more than model.vocab_size \(96\)"),
]

CASES = [
    *(_in_a_run(*row) for row in FOLDERS),
    *(_tokenizing(*row) for row in FOLDERS),
    *SENTENCEPIECE,
    *EXPORTS,
    *RUNS,
]
