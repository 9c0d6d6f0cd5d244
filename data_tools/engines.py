"""Text to token ids: the libraries that define them, and one that is faster and must agree with them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from data_tools.errors import InputError
from data_tools.token_bytes import bytes_of_ids, bytes_of_piece
from data_tools.tokenizer import load_tokenizer, vocabulary_size

EngineName = Literal["tokenizers", "fastokens", "sentencepiece"]

# Where implementations of one tokenizer are most likely to differ: scripts, composition, white space, digits, controls,
# code points that are unassigned or private, contractions, and special tokens spelled in a text.
PROBES = [
    "def f(x):\n\treturn x+1  # don't, DON'T, I'll\n\n\n    y = 3.14e10\r\n",
    "Grüße, 世界! 日本語 한국어 العربية हिन्दी ไทย кириллица Ωμέγα 🙂👨‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 \u0301\u0301 ﬁ Å ｆｕｌｌ İ ı ß ſ's ʰʷ Ⅷ ½² ١٢٣ 12345678901",
    " \t \u00a0\u2003\u3000\u2028\u0085\u200b\ufeff  x   ",
    "\x00\x01\x7f\x1b \U0010ffff\ue000\ufffe\u0378 \u2581\u2581a\u2581b",
    "<s>a</s><unk><pad><|endoftext|> <|im_start|>[INST]<0x41>",
    "a" * 300 + "-" * 300 + " " * 300,
]


class EngineError(Exception):
    """An engine cannot be used, failed, or gives other ids than the library that defines them. One line says why."""


class Engine(Protocol):
    """A tokenizer. eod: id that ends documents; vocab_size: one more than the largest id."""

    eod: int
    vocab_size: int

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, joined: [tokens]; and the number of ids of each text: [texts] int64."""


def open_reference(path: str | Path) -> "Tokenizers | SentencePiece":
    """The tokenizer of a Hugging Face folder, or of a SentencePiece model, alone or in a folder.

    It encodes special tokens spelled in a text as plain text, adds none, and never truncates or pads.

    Raises:
        InputError: there is no tokenizer, it is broken, or it has no token that ends documents.
    """
    model = _sentencepiece_model(Path(path))
    return Tokenizers(path) if model is None else SentencePiece(model)


def choose_engine(path: str | Path, wanted: Literal["auto", "tokenizers", "fastokens"]) -> tuple[EngineName, str]:
    """The engine for a tokenizer, and why it is not the fast one (empty if it is, or was not wanted).

    Raises:
        InputError: the tokenizer cannot be used, or the wanted engine cannot use it.
    """
    reference = open_reference(path)
    if isinstance(reference, SentencePiece):
        if wanted != "auto":
            raise InputError(f"{path}: a SentencePiece model, which only sentencepiece encodes; leave --engine at auto")
        return "sentencepiece", ""
    if wanted == "tokenizers":
        return "tokenizers", ""
    try:
        compare(Fastokens(path, reference), reference, PROBES)
    except EngineError as error:
        if wanted == "fastokens":
            raise InputError(f"{path}: {error}; leave --engine at auto") from error
        return "tokenizers", str(error)
    return "fastokens", ""


def compare(engine: Engine, reference: Engine, texts: list[str]) -> None:
    """Raises EngineError if the two give different ids for one of the texts."""
    for text in texts:
        if not np.array_equal(engine.encode([text])[0], reference.encode([text])[0]):
            raise EngineError(f"fastokens gives other ids than tokenizers for {text[:40]!r}")


class Tokenizers:
    """A Hugging Face tokenizer.json, encoded by `tokenizers`, the library that defines its meaning."""

    def __init__(self, folder: str | Path) -> None:
        self._tokenizer, self.eod = load_tokenizer(folder)
        self.vocab_size = vocabulary_size(self._tokenizer)
        self.digest = _digest(Path(folder) / "tokenizer.json", self.eod)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return _joined([encoding.ids for encoding in encodings])

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens spelled out."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def bytes_of_ids(self) -> np.ndarray | None:
        return bytes_of_ids(self._tokenizer)


class SentencePiece:
    """A SentencePiece model. Its end-of-sentence piece ends documents."""

    def __init__(self, model: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{model}: not a SentencePiece model ({str(error).splitlines()[0]})") from error
        self.eod = self._model.eos_id()
        if self.eod < 0:
            raise InputError(f"{model}: it has no end-of-sentence piece, which would end documents")
        self.vocab_size = self._model.get_piece_size()
        self.digest = _digest(model, self.eod)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return _joined(self._model.encode(texts, out_type=int, num_threads=1))

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def bytes_of_ids(self) -> np.ndarray:
        ids = range(self.vocab_size)
        silent = [self._model.is_control(i) or self._model.is_unknown(i) for i in ids]
        return np.array([0 if silent[i] else bytes_of_piece(self._model.id_to_piece(i)) for i in ids], np.int64)


class Fastokens:
    """A Hugging Face tokenizer.json, encoded by fastokens, which supports the common kinds.

    Raises:
        EngineError: fastokens is not installed, or does not support this kind; from encode: it failed.
    """

    def __init__(self, folder: str | Path, reference: Tokenizers) -> None:
        try:
            from fastokens import Tokenizer
        except ImportError as error:
            raise EngineError("fastokens is not installed (pip install fastokens)") from error
        self.eod, self.vocab_size = reference.eod, reference.vocab_size
        self._reference = reference
        with _failures():
            self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        with _failures():
            ids, offsets = self._tokenizer.encode_batch_flat(texts, split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.int64))


@contextmanager
def _failures() -> Iterator[None]:
    """Turn any failure into an EngineError. A Rust panic is not an Exception and cannot be sent to another process."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EngineError(f"fastokens cannot be used here ({reason})") from error


def _sentencepiece_model(path: Path) -> Path | None:
    if path.is_file() and path.suffix == ".model":
        return path
    model = path / "tokenizer.model"
    return model if model.is_file() and not (path / "tokenizer.json").exists() else None


def _digest(path: Path, eod: int) -> str:
    return hashlib.sha256(path.read_bytes() + b"%d" % eod).hexdigest()


def _joined(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    return np.fromiter(chain.from_iterable(documents), np.uint32, int(lengths.sum())), lengths
