"""From a batch of lines to token ids: what each worker process does."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np

from data_tools.parsing import parse
from data_tools.reading import Batch
from data_tools.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Encoded:
    """A batch after encoding.

    ids: [tokens], documents end to end; lengths: tokens of each document, end of document included;
    text_bytes: UTF-8 bytes of their texts; empty: documents without text, left out; problems: one line each.
    """

    ids: np.ndarray
    lengths: list[int]
    text_bytes: int
    empty: int
    problems: list[str]


@dataclass(frozen=True)
class Encoder:
    """Encodes batches. It pickles small: each process loads the tokenizer itself, at its first batch."""

    tokenizer_dir: str
    text_key: str
    append_eod: bool
    dtype: type[np.integer]

    def __call__(self, batch: Batch) -> Encoded:
        """Parse and encode a batch; broken lines come back as problems."""
        tokenizer, eod = _load_once(self.tokenizer_dir)
        parsed, problems = parse(batch, self.text_key)
        texts = [text for text in parsed if text]
        end = [eod] if self.append_eod else []
        documents = [encoding.ids + end for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = [len(document) for document in documents]
        return Encoded(
            ids=np.fromiter(chain.from_iterable(documents), self.dtype, sum(lengths)),
            lengths=lengths,
            text_bytes=sum(len(text.encode()) for text in texts),
            empty=len(parsed) - len(texts),
            problems=problems,
        )


_load_once = lru_cache(maxsize=1)(load_tokenizer)
