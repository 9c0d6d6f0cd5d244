"""What a run will read, worked out before any training from the data sets' indices alone (`jetmoe data mix`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from data_tools.indexed import open_index
from jetmoe_megatron.config.layout import phase_steps
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError


@dataclass(frozen=True)
class Share:
    """One data set in one phase. Tokens are those of whole sequences."""

    phase: str
    dataset: str
    share: float
    tokens: int  # asked of it in this phase
    available: int  # in one epoch
    epochs: float  # read at the end of the phase, all phases so far together


def plan(run: Run, cache: Path) -> list[Share]:
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
    """One line for each data set that the whole run reads more often than `data.warn_epochs`, or is tested on."""
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


def draw(run: Run, rows: list[Share], path: Path) -> None:
    """A bar for each phase, in shares, and a bar for each data set, in epochs read.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.dataset for row in rows))
    phases = list(dict.fromkeys(row.phase for row in rows))
    colours = {name: pyplot.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    height = 1.8 + 0.5 * len(phases) + 0.32 * len(names)
    figure, (shares, epochs) = pyplot.subplots(
        2, 1, figsize=(9, height), height_ratios=(len(phases) + 1, 0.7 * len(names) + 1), layout="constrained"
    )
    ends = dict.fromkeys(phases, 0.0)
    for row in rows:
        shares.barh(row.phase, row.share, left=ends[row.phase], color=colours[row.dataset], edgecolor="white")
        if row.share > 0.04:
            middle = ends[row.phase] + row.share / 2
            shares.text(middle, row.phase, f"{row.share:.1%}", ha="center", va="center", fontsize=8)
        ends[row.phase] += row.share
    shares.invert_yaxis()
    shares.set(xlim=(0, 1), title=f"{run.name}: mixture of each phase")
    shares.xaxis.set_major_formatter("{x:.0%}")
    last = {row.dataset: row.epochs for row in rows}
    bars = epochs.barh(names, [last[name] for name in names], color=[colours[name] for name in names])
    epochs.bar_label(bars, [f"{last[name]:.2f}" for name in names], padding=3, fontsize=8)
    epochs.axvline(run.data.warn_epochs, color="black", linestyle="--", linewidth=1)
    epochs.invert_yaxis()
    epochs.margins(x=0.1)
    epochs.set(title=f"epochs read by the end (dashed: data.warn_epochs, {run.data.warn_epochs:g})")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot draw there ({error})") from error
    finally:
        pyplot.close(figure)
