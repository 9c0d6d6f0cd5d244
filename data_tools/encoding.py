"""From a shard to token ids: what each worker process does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from data_tools.batch import Batch
from data_tools.engines import Engine, EngineName, Fastokens, Tokenizers, compare, open_reference
from data_tools.errors import writing
from data_tools.printing import printable
from data_tools.reading import read_texts
from data_tools.shards import Shard

# The fast engine is compared with its reference at three places of each batch, on this share of the characters.
# The reference is much slower, so a larger share would take noticeable time.
_COMPARED = 1 / 400


@dataclass
class Part:
    """An encoded shard: the files NAME.bin (token ids), NAME.lengths (int32) and NAME.problems in the folder.

    documents, tokens: written, including end-of-document tokens; bytes: of UTF-8 text; empty: texts without tokens,
    left out; skipped: broken documents, left out; lines: read; problems: lines in NAME.problems, each
    `NUMBER message`, where NUMBER counts lines from the start of the shard.
    """

    shard: Shard
    name: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    skipped: int = 0
    lines: int = 0
    problems: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Encoder:
    """Encodes shards into files of a folder. Its pickle is small, because each process loads the tokenizer once.

    stop_at_problem: do not read a shard beyond a broken line.
    """

    tokenizer: str
    engine: EngineName
    text_key: str
    append_eod: bool
    dtype: type[np.integer]
    stop_at_problem: bool
    folder: Path = Path()

    def __call__(self, task: tuple[int, Shard]) -> Part:
        """Read, parse and encode shard number task[0].

        Raises:
            InputError: its file cannot be read, or the folder cannot be written.
            EngineError: the fast engine failed, or its ids differ from its reference's.
        """
        number, shard = task
        part = Part(shard, f"{number}")
        path = self.folder / part.name
        with _files(path) as (ids_file, lengths_file, problems_file):
            for batch in read_texts(shard, self.text_key):
                ids, lengths = self._encode([text for text in batch.texts if text])
                with writing(path):
                    ids_file.write(ids.data)
                    lengths_file.write(lengths.astype(np.int32).data)
                    problems_file.writelines(_line(number, message) for number, message in batch.problems)
                _count(part, batch, len(lengths), len(ids))
                if batch.problems and self.stop_at_problem:
                    break
        return part

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        engine, reference = _open_once(self.tokenizer, self.engine)
        ids, lengths = engine.encode(texts)
        if reference is not None:
            compare(engine, reference, _sample(texts))
        lengths = lengths[lengths > 0]
        if not self.append_eod:
            return ids.astype(self.dtype), lengths
        ended = np.full(len(ids) + len(lengths), engine.eod, self.dtype)
        inside: np.ndarray = np.ones(len(ended), bool)
        inside[np.cumsum(lengths + 1) - 1] = False
        ended[inside] = ids
        return ended, lengths + 1


@lru_cache(maxsize=1)
def _open_once(tokenizer: str, name: EngineName) -> tuple[Engine, Engine | None]:
    """The engine, and the engine to compare it with, if any."""
    reference = open_reference(tokenizer)
    if name == "fastokens" and isinstance(reference, Tokenizers):
        return Fastokens(tokenizer, reference), reference
    return reference, None


@contextmanager
def _files(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes], IO[bytes]]]:
    with writing(path):
        files = [open(f"{path}.{kind}", "wb") for kind in ("bin", "lengths", "problems")]
    try:
        yield files[0], files[1], files[2]
    finally:
        with writing(path):
            for file in files:
                file.close()


def _sample(texts: list[str]) -> list[str]:
    """The start of the first text, the middle of the middle text, and the end of the last text."""
    if not texts:
        return []
    size = max(64, int(sum(map(len, texts)) * _COMPARED / 3))
    middle = texts[len(texts) // 2]
    start = max(0, (len(middle) - size) // 2)
    return [texts[0][:size], middle[start : start + size], texts[-1][-size:]]


def _count(part: Part, batch: Batch, documents: int, tokens: int) -> None:
    part.documents += documents
    part.tokens += tokens
    part.bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in batch.texts)
    part.empty += len(batch.texts) - documents
    part.skipped += batch.lost
    part.lines += batch.lines
    part.problems += len(batch.problems)
    part.notes += batch.notes


def _line(number: int, message: str) -> bytes:
    return f"{number} {printable(message)}\n".encode()
