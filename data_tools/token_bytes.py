"""How many bytes of text each token id stands for, to compare losses of models with different tokenizers."""

import json
import re

import numpy as np
from tokenizers import Tokenizer

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte that is in no other token


def bytes_of_ids(tokenizer: Tokenizer) -> np.ndarray | None:
    """[ids] int64; 0 for special tokens. None for a kind of tokenizer whose tokens do not spell their text."""
    decoder = json.dumps(json.loads(tokenizer.to_str())["decoder"])
    is_byte_level = '"ByteLevel"' in decoder  # each byte is one character
    if not (is_byte_level or '"Metaspace"' in decoder or '"ByteFallback"' in decoder):
        return None
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_tokens_decoder()
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        if number not in added:
            lengths[number] = len(token) if is_byte_level else bytes_of_piece(token)
        elif not added[number].special:
            lengths[number] = len(token.encode())
    return lengths


def bytes_of_piece(piece: str) -> int:
    """Of SentencePiece, which writes a space as U+2581."""
    return 1 if _BYTE.fullmatch(piece) else len(piece.replace(_SPACE, " ").encode())
