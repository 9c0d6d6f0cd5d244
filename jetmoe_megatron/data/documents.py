"""Where a document ends within a sequence, and what may not be seen across that.

A training sequence holds several documents, each closed by the end-of-document token. Nothing published says whether
JetMoE's training kept them apart. By default (`data.reset_positions`, `data.mask_attention` and `data.mask_loss` off) a
token sees all before it in its sequence.

Letters: S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from jetmoe_megatron.config.schema import Run


def document_of_tokens(tokens_S: Tensor, eod: int) -> Tensor:
    """int64 [S], the number of each token's document within the sequence. The token that ends it belongs to it."""
    ends_S = (tokens_S == eod).long()
    return ends_S.cumsum(0) - ends_S


@dataclass(frozen=True)
class EndOfDocument:
    """What Megatron's GPTDataset asks of a tokenizer. The id is -1, which never occurs, where it does not matter."""

    eod: int
    vocab_size: int
    pad: int = -1  # never occurs: sequences are always full

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "eod": self.eod}


def end_of_document(run: Run) -> EndOfDocument:
    """Raises data_tools.errors.InputError if the tokenizer's folder does not say which token it is."""
    eod = _eod_of(run.tokenizer) if run.tokenizer and run.data.keeps_documents_apart else -1
    return EndOfDocument(eod, run.model.vocab_size)


@lru_cache(maxsize=1)
def _eod_of(folder: str) -> int:
    from data_tools.engines import open_reference  # of packages that a machine that only trains need not have

    return open_reference(folder).eod
