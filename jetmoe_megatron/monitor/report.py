"""What a run did, read from its folder."""

from __future__ import annotations

import statistics
from pathlib import Path

from jetmoe_megatron.checkpoint.integrity import newest_whole
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.monitor.jsonl import read_metrics


def report(folder: Path) -> str:
    """A table of two columns. Raises UserError if there are no metrics, or not those of a run."""
    metrics = folder / "metrics.jsonl"
    records = read_metrics(metrics)
    if not records:
        raise UserError(f"{metrics}: no steps recorded; is {folder} a run folder?")
    try:
        rows = _numbers(records)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{metrics}: not the metrics of a run ({type(error).__name__}: {error})") from None
    checkpoint, exported = newest_whole(folder / "checkpoints"), folder / "hf"
    rows += [("checkpoint", str(checkpoint))] if checkpoint else []
    rows += [("Hugging Face", str(exported))] if exported.is_dir() else []
    rows.append(("metrics", str(metrics)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _numbers(records: list[dict]) -> list[tuple[str, str]]:
    first, last = records[0], records[-1]
    rows = [("steps", f"{last['step']:,}"), ("tokens", f"{last['tokens']:,}")]
    rows += [
        (f"  from {key.removeprefix('dataset_tokens/')}", f"{value:,}")
        for key, value in last.items()
        if key.startswith("dataset_tokens/")
    ]
    rows += [("first loss", f"{first['lm_loss']:.4f}"), ("last loss", f"{last['lm_loss']:.4f}")]
    evaluated = [record for record in records if "held_out_loss" in record]
    if evaluated:
        rows += [
            (key.replace("held_out_loss/", "  on ").replace("held_out_loss", "held-out loss"), f"{value:.4f}")
            for key, value in evaluated[-1].items()
            if key.startswith("held_out_loss")
        ]
    rows.append(("tokens/s", f"{statistics.median(r['tokens_per_second'] for r in records):,.0f} (median)"))
    return rows
