"""The sequences that a start would train on first."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from data_tools.printing import printable
from data_tools.text_table import table
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.documents import document_of_tokens
from jetmoe_megatron.data.ledger import Ledger
from jetmoe_megatron.data.mixture import RunSamples
from jetmoe_megatron.data.step_batches import micro_batches_of_step
from jetmoe_megatron.errors import UserError

_SHOWN = 4  # sequences
_DECODED = 64  # tokens of each
_NARROWEST = 24  # columns of their text


def first_batch(run: Run, layout: Layout, samples: RunSamples, ledger: Ledger, done: int) -> Iterator[str]:
    """
    Args:
        ledger: says what was read before.
        done: steps.

    Raises:
        UserError, data_tools.errors.InputError: a sequence cannot be read, or was made with another tokenizer.
    """
    after = samples.advance(ledger.read, layout.global_sequences)
    before = dict.fromkeys(after.sequences, 0) | ledger.read.sequences
    counts = {name: count - before[name] for name, count in after.sequences.items() if count > before[name]}
    drawn = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    yield printable(f"the first batch, of step {done + 1:,}: {layout.global_sequences:,} sequences ({drawn})")
    rows = [_row(run, samples, number) for number in islice(_samples(run, layout, done), _SHOWN)]
    titles = ["data set", "tokens", "documents", "begins with"]
    beside = sum(max(len(line[i]) for line in [titles, *rows]) + 3 for i in range(3) if any(row[i] for row in rows))
    room = max(_NARROWEST, shutil.get_terminal_size().columns - beside - 4)
    yield from table(titles, [[*row[:3], _shortened(row[3], room)] for row in rows])


def _samples(run: Run, layout: Layout, step: int) -> Iterator[int]:
    """Numbers of the step's samples, rank by rank."""
    for rank in range(layout.data):
        sizes = layout.micro_batches, run.batch.micro_sequences, layout.data
        yield from chain.from_iterable(micro_batches_of_step(step, *sizes, rank))


def _row(run: Run, samples: RunSamples, number: int) -> list[str]:
    name, _ = samples.source(number)
    tokens_S = samples[number]["tokens"]
    ids = tokens_S.tolist()
    if run.tokenizer is None:
        return [printable(name), str(len(ids)), "", " ".join(map(str, ids[:_DECODED]))]
    from data_tools.engines import open_reference  # needs packages that a machine for training may lack

    tokenizer = open_reference(Path(run.tokenizer))
    if max(ids) >= tokenizer.vocab_size:
        raise UserError(
            f"tokenizer: data set {name!r} has token id {max(ids)}, and {run.tokenizer} has {tokenizer.vocab_size} "
            "tokens: was it made with another tokenizer?"
        )
    documents = int(document_of_tokens(tokens_S, tokenizer.eod).max()) + 1
    return [printable(name), str(len(ids)), str(documents), printable(tokenizer.decode(ids[:_DECODED]))]


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."
