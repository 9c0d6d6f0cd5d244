"""Engines give the ids of the libraries that define them. If the fast engine does not, it is not used."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from data_tools import engines
from data_tools.engines import PROBES, EngineError, Fastokens, Tokenizers, choose_engine, compare, open_reference
from data_tools.errors import InputError
from data_tools.indexed import open_index
from data_tools.inspect import inspect
from data_tools.tokenize import tokenize
from tests.data_tools.datasets import texts_of

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train(folder: Path, corpus: Path, change: Callable[[Tokenizer], None]) -> Path:
    """A Hugging Face folder with a byte-level BPE of 600 ids, changed before it is trained."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    change(tokenizer)
    special = [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(iter(texts_of(corpus)), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def split_words(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def compose(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()


def prefix_space(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def compose_compatible(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFKC()


def strip(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Strip()


def add_tokens(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("  ", normalized=False), AddedToken("foo", lstrip=True)])


KINDS = {change.__name__: change for change in (split_words, compose, prefix_space, add_tokens)}


def odd_texts(count: int) -> list[str]:
    rng = random.Random(0)
    characters = " \t\n\r'sStTdD019.,!?-_aé中🙂\u0301\u00a0\x00</s>foo"
    texts = []
    for _ in range(count):
        size = rng.randrange(60)
        points = [rng.choice([rng.randrange(0x110000), rng.randrange(0x3000), rng.randrange(256)]) for _ in range(size)]
        texts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
        texts.append("".join(rng.choice(characters) for _ in range(size)))
    return [*texts, *PROBES, "", "x" * 100_000, "中" * 10_000, "\n" * 3_000]


@pytest.fixture
def copy(tmp_path: Path, tokenizer_dir: Path) -> Path:
    return Path(shutil.copytree(tokenizer_dir, tmp_path / "copy"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A SentencePiece BPE with byte fallback, as Llama's was."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts_of(corpus)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def pieces(tokenizer: Tokenizer) -> None:
    """As SentencePiece's."""
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()


@pytest.mark.parametrize("kind", [split_words, prefix_space, add_tokens, pieces], ids=lambda kind: kind.__name__)
def test_bytes_of_ids(tmp_path: Path, corpus: Path, kind: Callable[[Tokenizer], None]) -> None:
    folder = train(tmp_path / "bpe", corpus, kind)
    engine = Tokenizers(folder)
    assert_bytes(engine, prefix=kind in (prefix_space, pieces), texts=odd_texts(100) if kind != pieces else TEXTS)
    of_ids = engine.bytes_of_ids()
    assert of_ids is not None and of_ids[engine.eod] == 0


def test_bytes_of_ids_of_sentencepiece(model: Path) -> None:
    assert_bytes(
        open_reference(model), prefix=True, texts=[text for text in odd_texts(100) if text and "\u2581" not in text]
    )  # it means a space


def test_words_do_not_spell_their_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"<unk>": 0, "</s>": 1, "a": 2, "##b": 3}, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert Tokenizers(tmp_path).bytes_of_ids() is None


TEXTS = ["def f(x): return x", " a  b", "import numpy\nprint(1)"]


def assert_bytes(engine: engines.Tokenizers | engines.SentencePiece, prefix: bool, texts: list[str]) -> None:
    """prefix: the tokenizer puts a space before a text that begins with none, or before each (SentencePiece)."""
    of_ids = engine.bytes_of_ids()
    assert of_ids is not None
    for text in texts:
        ids, _ = engine.encode([text])
        space = prefix and (isinstance(engine, engines.SentencePiece) or not text.startswith(" "))
        assert of_ids[ids].sum() == len(text.encode()) + bool(space and text), text


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_engine_gives_the_ids_of_tokenizers(tmp_path: Path, corpus: Path, kind: str) -> None:
    folder = train(tmp_path / "bpe", corpus, KINDS[kind])
    assert choose_engine(folder, "auto") == ("fastokens", "")
    reference = Tokenizers(folder)
    texts = odd_texts(500)
    ids, lengths = Fastokens(folder, reference).encode(texts)
    their_ids, their_lengths = reference.encode(texts)
    assert np.array_equal(ids, their_ids) and np.array_equal(lengths, their_lengths)
    theirs = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    for text, found in zip(texts[::50], np.split(ids, np.cumsum(lengths)[:-1])[::50], strict=True):
        assert found.tolist() == theirs.encode(text, add_special_tokens=False)


def test_saved_truncation_and_padding_are_ignored(copy: Path) -> None:
    saved = Tokenizer.from_file(str(copy / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=9)
    saved.save(str(copy / "tokenizer.json"))
    reference = Tokenizers(copy)
    for engine in (reference, Fastokens(copy, reference)):
        assert engine.encode(["q", "q w e r t y u i o p"])[1].tolist() == [1, 17]


def test_a_tokenizer_it_does_not_know_goes_to_the_reference(tmp_path: Path, corpus: Path) -> None:
    folder = train(tmp_path / "bpe", corpus, compose_compatible)
    name, why = choose_engine(folder, "auto")
    assert name == "tokenizers"
    assert why.startswith("fastokens cannot be used here (") and "\n" not in why
    with pytest.raises(InputError, match="fastokens cannot be used here .*; leave --engine at auto"):
        choose_engine(folder, "fastokens")
    messages: list[str] = []
    tokenize([corpus], tmp_path / "out", folder, report=messages.append)
    assert messages == [f"note: {why}; encoding with tokenizers"]
    reference = Tokenizers(folder)
    first = texts_of(corpus)[0]
    found = open_index(tmp_path / "out").map_tokens()[: len(reference.encode([first])[0])]
    assert found.tolist() == reference.encode([first])[0].tolist()


def test_a_text_of_no_tokens_is_empty(tmp_path: Path, corpus: Path, jsonl: Callable[..., Path]) -> None:
    """Megatron-LM ends no such document either."""
    folder = train(tmp_path / "bpe", corpus, strip)
    path = jsonl("in.jsonl", b'{"text": "  "}', b'{"text": "a"}', b'{"text": " "}')
    stats = tokenize([path], tmp_path / "out", folder, report=lambda message: None)
    assert (stats.documents, stats.tokens, stats.empty) == (1, 2, 2)


def fake_fastokens(monkeypatch: pytest.MonkeyPatch, encode: Callable[..., object]) -> None:
    """A library of this name whose tokenizers do as told."""
    from fastokens import Tokenizer as Real

    class Fake:
        def __init__(self, path: str) -> None:
            self._real = Real.from_file(path)

        from_file = classmethod(lambda cls, path: cls(path))

        def no_truncation(self) -> None: ...

        no_padding = no_truncation

        def encode_batch_flat(self, texts: list[str], split_special_tokens: bool) -> object:
            return encode(self._real, texts)

    module = ModuleType("fastokens")
    module.Tokenizer = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastokens", module)


class Panic(BaseException):
    """Rust's panics arrive as such."""


def panics(real: object, texts: list[str]) -> object:
    raise Panic("index out of bounds\nnote: run with RUST_BACKTRACE=1")


def special_tokens_split(real: object, texts: list[str]) -> object:
    return real.encode_batch_flat(texts, split_special_tokens=False)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (panics, r"fastokens cannot be used here \(index out of bounds\)"),
        (special_tokens_split, "fastokens gives other ids than tokenizers for '<s>a</s><unk>"),
    ],
)
def test_failures_and_differences_are_found_before_anything_is_encoded(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, encode: Callable[..., object], message: str
) -> None:
    fake_fastokens(monkeypatch, encode)
    name, _ = choose_engine(tokenizer_dir, "auto")
    assert name == "tokenizers"
    with pytest.raises(InputError, match=f"{message}.*; leave --engine at auto"):
        choose_engine(tokenizer_dir, "fastokens")


def test_without_the_library_the_reference_is_taken(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert choose_engine(tokenizer_dir, "auto") == ("tokenizers", "fastokens is not installed (pip install fastokens)")


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_found_later_starts_the_run_again_by_the_reference(
    tmp_path: Path, tokenizer_dir: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, where: str, fails: bool
) -> None:
    """Wherever in a file the fast engine is wrong, and in whichever file."""
    from data_tools import encoding
    from data_tools import tokenize as module

    def wrong_for_umlauts(real: object, texts: list[str]) -> object:
        if fails and any("Ö" in text for text in texts):
            raise Panic("no Ö")
        return real.encode_batch_flat(  # type: ignore[attr-defined]
            [text.replace("Ö", "O") for text in texts], split_special_tokens=True
        )

    fake_fastokens(monkeypatch, wrong_for_umlauts)
    monkeypatch.setattr(module, "ordered_map", lambda function, items, workers: iter_map(function, items))
    encoding._open_once.cache_clear()
    lines = corpus.read_bytes().splitlines(keepends=True)[:401]
    odd = b'{"text": "\\u00d6l"}\n'
    at = {"first": 0, "middle": len(lines) // 2, "last": len(lines) - 1}[where]
    lines[at] = odd
    (tmp_path / "a.jsonl").write_bytes(corpus.read_bytes())
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    messages: list[str] = []
    tokenize(files, tmp_path / "out", tokenizer_dir, report=messages.append)
    reason = "fastokens cannot be used here (no Ö)" if fails else "fastokens gives other ids than tokenizers for 'Öl'"
    assert messages == [f"note: {reason}; starting again with tokenizers"]
    with pytest.raises(InputError, match="leave --engine at auto"):
        tokenize(files, tmp_path / "fast", tokenizer_dir, engine="fastokens", report=messages.append)
    encoding._open_once.cache_clear()
    tokenize(files, tmp_path / "want", tokenizer_dir, engine="tokenizers")
    for kind in ("bin", "idx"):
        assert (tmp_path / f"out.{kind}").read_bytes() == (tmp_path / f"want.{kind}").read_bytes()


def iter_map(function: Callable[..., object], items: object) -> object:
    yield from map(function, items)  # type: ignore[call-overload]


def test_compare_sees_a_difference_in_any_text(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Tokenizers(tokenizer_dir)
    compare(Fastokens(tokenizer_dir, reference), reference, odd_texts(10))
    fake_fastokens(monkeypatch, special_tokens_split)
    with pytest.raises(EngineError, match="for 'x</s>'"):
        compare(Fastokens(tokenizer_dir, reference), reference, ["x", "x</s>", "x"])


def test_a_sentencepiece_model_gives_its_own_ids(tmp_path: Path, model: Path, corpus: Path) -> None:
    """Alone, and in a folder without a tokenizer.json; text that spells its control tokens is text."""
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = [text for text in odd_texts(200) if text]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for tokenizer in (model, model.parent):
        tokenize([path], tmp_path / "out", tokenizer, overwrite=True, report=lambda message: None)
        index = open_index(tmp_path / "out")
        offsets = index.token_offsets(0, index.documents)
        documents = [part.tolist() for part in np.split(index.map_tokens(), offsets[1:-1])]
        assert documents == [[*theirs.encode(text), theirs.eos_id()] for text in texts]
    reference = open_reference(model)
    assert (reference.eod, reference.vocab_size) == (2, 400)
    assert reference.decode(theirs.encode("a b")) == "a b"
    assert choose_engine(model, "auto") == ("sentencepiece", "")
    seen = inspect(tmp_path / "out", model, document=0, check=True)
    assert not seen.problems and not seen.warnings and seen.document is not None
    assert seen.document.text.startswith(theirs.decode(documents[0][:-1]))


def test_sentencepiece_refusals(tmp_path: Path, model: Path, corpus: Path) -> None:
    for name in ("tokenizers", "fastokens"):
        with pytest.raises(InputError, match="which only sentencepiece encodes; leave --engine at auto"):
            choose_engine(model, name)
    broken = tmp_path / "broken.model"
    broken.write_bytes(model.read_bytes()[:100])
    with pytest.raises(InputError, match="broken.model: not a SentencePiece model") as caught:
        open_reference(broken)
    assert "\n" not in str(caught.value)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts_of(corpus)),
        model_prefix=str(tmp_path / "endless"),
        vocab_size=300,
        model_type="bpe",
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(InputError, match="endless.model: it has no end-of-sentence piece"):
        open_reference(tmp_path / "endless.model")


def test_the_hugging_face_file_of_a_folder_with_both_counts(copy: Path, model: Path) -> None:
    shutil.copy(model, copy / "tokenizer.model")
    assert isinstance(open_reference(copy), Tokenizers)
    assert engines.open_reference(copy).digest != open_reference(model).digest
