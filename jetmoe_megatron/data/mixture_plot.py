"""A drawing of what a run will read (`jetmoe data mix --plot`)."""

from __future__ import annotations

from pathlib import Path

from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.mixture_report import Share
from jetmoe_megatron.page.picture import picture


def draw(run: Run, rows: list[Share], path: Path) -> None:
    """A bar for each phase, in shares, and a bar for each data set, in epochs read.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    names = list(dict.fromkeys(row.dataset for row in rows))
    phases = list(dict.fromkeys(row.phase for row in rows))
    heights = (len(phases) + 1, 0.7 * len(names) + 1)
    size = (9, 1.8 + 0.5 * len(phases) + 0.32 * len(names))
    with picture(path, 120, 2, figsize=size, height_ratios=heights) as (pyplot, (shares, epochs)):
        colours = {name: pyplot.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
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
