"""The curves of a run (`jetmoe report --plot`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.errors import UserError, printable
from jetmoe_megatron.page.picture import picture
from jetmoe_megatron.report.lines import steps_of

_POINTS = 2000  # of a curve at most: points between them are left out


def draw_curves(folder: Path, path: Path) -> None:
    """Loss, learning rate, the routers' balance and load, gradient norm, over consumed tokens.

    Raises:
        UserError: matplotlib is not installed, there are no metrics of a run, or the file cannot be written.
    """
    metrics = RunFolder(folder).metrics
    records = list(steps_of(metrics))
    if not records:
        raise UserError(f"{metrics}: no steps recorded; is {folder} a run folder?")
    held_out = sorted({key for record in records for key in record if key.startswith("held_out_loss/")})
    panels: dict[str, dict[str, str]] = {
        "loss (nats per token)": {"lm_loss": "training"}
        | {key: f"held-out, {key.partition('/')[2]}" for key in held_out},
        "learning rate": {"lr": ""},
        "balance loss (1: even)": {"moa_balance_loss": "attention", "moe_balance_loss": "MLP"},
        "busiest expert's load (1: even)": {"moa_load_imbalance": "attention", "moe_load_imbalance": "MLP"},
        "gradient norm": {"grad_norm": ""},
    }
    with picture(path, 110, len(panels), figsize=(8, 9), sharex=True) as (_, axes):
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            for key, label in curves.items():
                x, y = _curve(records, key)
                axis.plot(x, y, "o-" if key in held_out else "-", ms=3, lw=1, label=printable(label))
            axis.set_title(title, fontsize=9, loc="left")
            axis.grid(alpha=0.3)
            if len(curves) > 1:
                axis.legend(fontsize=8)
        axes[-1].set_yscale("log")
        axes[-1].set_xlabel("tokens")


def _curve(records: Iterable[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(r["tokens"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    points = points[:: 1 + len(points) // _POINTS]
    return [x for x, _ in points], [y for _, y in points]
