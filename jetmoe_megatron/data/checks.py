"""Checks of data files that Megatron does not make. On local files they need neither torch nor Megatron."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.errors import InputError
from data_tools.indexed import open_index, read_index
from jetmoe_megatron.config.run_folder import data_cache
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError

_SCAN_SEQUENCES = 2**22  # checking a longer index would delay the start: `jetmoe data prepare` checks all of it
_SCAN_TOKENS = 2**23  # token ids checked before training; every batch is checked again when it is read


def check_data(run: Run, look_inside: bool = True, thorough: bool = False) -> None:
    """Check the tokenizer, and every data file that the run will read.

    Args:
        look_inside: also check token ids, evenly over each file; one rank is enough for that.
        thorough: check every entry of every index, however long that takes.

    Raises:
        UserError, data_tools.errors.InputError: one line that names the file and what is wrong.
    """
    if run.tokenizer:
        _check_tokenizer(Path(run.tokenizer), run.model.vocab_size)
    named = {d.name: d.path for phase in run.phases for d in phase.data if d.weight > 0}
    for name, path in [*named.items(), *((d.name, d.path) for d in run.evaluation.data)]:
        where = f"data set {name!r} ({path})"
        if "://" in path:  # object storage
            from jetmoe_megatron.data.storage import fetch_index

            fetch_index(path, data_cache(run))  # now: later only rank 0 could
            continue
        index = open_index(path)
        if thorough or (look_inside and len(index.sequence_lengths) <= _SCAN_SEQUENCES):
            read_index(path)
        elif problem := index.problem_at_end():
            raise InputError(f"{problem}; the file is damaged, write it again")
        check_length(index.tokens, run.batch.sequence_length, where)
        if look_inside:
            tokens = index.map_tokens()
            block = min(len(tokens), 2**20)
            blocks = max(1, min(len(tokens), _SCAN_TOKENS) // block)
            for start in np.linspace(0, len(tokens) - block, num=blocks, dtype=np.int64):
                check_token_ids(tokens[start : start + block], run.model.vocab_size, where)


def _check_tokenizer(folder: Path, vocab_size: int) -> None:
    if not folder.is_dir():
        raise UserError(f"tokenizer: {folder} is not a folder")
    from data_tools.engines import open_reference  # needs packages that a machine for training may lack

    size = open_reference(folder).vocab_size
    if size > vocab_size:
        raise UserError(f"tokenizer: {folder} has {size} tokens, more than model.vocab_size ({vocab_size})")


def check_length(tokens: int, sequence_length: int, where: str) -> None:
    if tokens < sequence_length + 1:
        raise UserError(
            f"{where}: {tokens} tokens are too few for one sequence of {sequence_length} and its next token"
        )


def check_token_ids(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    largest, smallest = int(tokens.max()), int(tokens.min())
    if largest >= vocab_size or smallest < 0:
        raise UserError(
            f"{where}: token id {largest if largest >= vocab_size else smallest} is outside the model's vocabulary of "
            f"{vocab_size}: was it made with another tokenizer?"
        )
