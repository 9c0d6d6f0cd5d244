"""What a run will read, computed before training from the indices of the data sets only (`jetmoe data mix`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from data_tools.indexed import open_index
from jetmoe_megatron.config.layout import phase_steps
from jetmoe_megatron.config.schema import Run


@dataclass(frozen=True)
class Share:
    """One data set in one phase. Tokens are those of whole sequences."""

    phase: str
    dataset: str
    share: float
    tokens: int  # read in this phase
    available: int  # in one epoch
    epochs: float  # read by the end of the phase, in all phases so far


def shares(run: Run, cache: Path) -> list[Share]:
    """cache: where the indices of data sets in object storage are copied to.

    Raises data_tools.errors.InputError if a data set cannot be opened."""
    length = run.batch.sequence_length
    available: dict[str, int] = {}
    read: dict[str, float] = {}
    rows = []
    for phase, steps in zip(run.phases, phase_steps(run), strict=True):
        for dataset in phase.data:
            if not dataset.weight:
                continue
            if dataset.name not in available:
                available[dataset.name] = (_tokens(dataset.path, cache) - 1) // length * length
            share = phase.shares[dataset.name]
            tokens = round(share * steps * run.batch.global_tokens)
            read[dataset.name] = read.get(dataset.name, 0) + tokens
            epochs = read[dataset.name] / available[dataset.name] if available[dataset.name] else float("inf")
            rows.append(Share(phase.name, dataset.name, share, tokens, available[dataset.name], epochs))
    return rows


def _tokens(path: str, cache: Path) -> int:
    if "://" not in path:
        return open_index(path).tokens
    from jetmoe_megatron.data.storage import count_tokens, open_dataset  # which load Megatron

    return count_tokens(open_dataset(path, cache))


def warnings(run: Run, rows: list[Share]) -> list[str]:
    """One line for each data set that is also held out, or that the run reads more often than `data.warn_epochs`."""
    last = {row.dataset: row for row in rows}
    trained = {os.path.realpath(d.path): d.name for phase in run.phases for d in phase.data if d.weight > 0}
    seen = [(d.name, trained.get(os.path.realpath(d.path))) for d in run.evaluation.data]
    return [
        f"warning: evaluation.data {name!r} is data set {other!r}, which the run trains on"
        for name, other in seen
        if other
    ] + [
        f"warning: data set {name!r} is read {row.epochs:.1f} times, more often than data.warn_epochs "
        f"({run.data.warn_epochs:g})"
        for name, row in last.items()
        if row.epochs > 1.001 * run.data.warn_epochs  # phases are rounded up to whole steps
    ]


def table(rows: list[Share]) -> str:
    head = ("phase", "data set", "share", "tokens asked", "tokens in an epoch", "epochs so far")
    cells = [head] + [
        (r.phase, r.dataset, f"{r.share:.2%}", f"{r.tokens:,}", f"{r.available:,}", f"{r.epochs:.2f}") for r in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    left = 2  # names to the left, numbers to the right
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
