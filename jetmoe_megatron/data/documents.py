"""Where documents end within a sequence, for the options that keep them apart.

A training sequence holds several documents, each closed by the end-of-document token. Nothing published says whether
JetMoE's training kept them apart. By default (`data.reset_positions`, `data.mask_attention` and `data.mask_loss` off) a
token sees all tokens before it in its sequence.

Letters: S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from jetmoe_megatron.config.schema import Run


def document_of_tokens(tokens_S: Tensor, eod: int) -> Tensor:
    """int64 [S], the number of each token's document within the sequence. An end token belongs to its document."""
    ends_S = (tokens_S == eod).long()
    return ends_S.cumsum(0) - ends_S


@dataclass(frozen=True)
class EndOfDocument:
    """What Megatron's GPTDataset needs of a tokenizer. `eod` is -1, which never occurs, if a run does not need it."""

    eod: int
    vocab_size: int
    pad: int = -1  # never occurs: sequences are always full

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "eod": self.eod}


def end_of_document(run: Run) -> EndOfDocument:
    """Raises data_tools.errors.InputError if the tokenizer's folder does not say which token ends a document."""
    eod = _eod_of(run.tokenizer) if run.tokenizer and run.data.keeps_documents_apart else -1
    return EndOfDocument(eod, run.model.vocab_size)


@lru_cache(maxsize=1)
def _eod_of(folder: str) -> int:
    from data_tools.engines import open_reference  # needs packages that a machine for training may lack

    return open_reference(folder).eod
