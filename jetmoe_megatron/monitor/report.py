"""What a run did, read from its folder."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jetmoe_megatron.checkpoint.checksums import newest_whole
from jetmoe_megatron.checkpoint.folder import newest
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.monitor.jsonl import each_record
from jetmoe_megatron.monitor.table import two_columns
from jetmoe_megatron.monitor.terminal import duration


def report(folder: Path) -> str:
    """A table of two columns. Raises UserError if there are no metrics, or not those of a run."""
    files = RunFolder(folder)
    metrics = files.metrics
    records = each_record(metrics)
    first = next(records, None)
    if first is None:
        raise UserError(f"{metrics}: no steps recorded; is {folder} a run folder?")
    try:
        rows = _numbers(first, records)
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # for integers too large for a float
        raise UserError(f"{metrics}: not the metrics of a run ({type(error).__name__}: {error})") from None
    checkpoint, exported = newest_whole(files.checkpoints), newest(files.exports)
    rows += [("checkpoint", str(checkpoint))] if checkpoint else []
    rows += [("Hugging Face", str(exported))] if exported else []
    rows.append(("metrics", str(metrics)))
    return two_columns(rows)


def _numbers(first: dict[str, Any], others: Iterator[dict[str, Any]]) -> list[tuple[str, str]]:
    last, evaluated, rates, skipped = first, dict[str, float](), list[float](), 0
    spent = dict[str, float]()  # seconds
    for record in itertools.chain([first], others):
        last = record
        evaluated = record if "held_out_loss" in record else evaluated
        rates.append(record["tokens_per_second"])
        skipped += "skipped" in record
        for name, seconds in _seconds(record):
            spent[name] = spent.get(name, 0.0) + seconds
    rows = [("steps", f"{last['step']:,}"), ("tokens", f"{last['tokens']:,}")]
    rows += [
        (f"  from {key.removeprefix('dataset_tokens/')}", f"{value:,}")
        for key, value in last.items()
        if key.startswith("dataset_tokens/")
    ]
    rows += [("skipped steps", f"{skipped:,}")] if skipped else []
    rows += [("first loss", f"{first['lm_loss']:.4f}"), ("last loss", f"{last['lm_loss']:.4f}")]
    rows += [
        (key.replace("held_out_loss/", "  on ").replace("held_out_loss", "held-out loss"), f"{value:.4f}")
        for key, value in evaluated.items()
        if key.startswith("held_out_loss")
    ]
    rows.append(("tokens/s", f"{statistics.median(rates):,.0f} (median)"))
    wall = sum(spent.values())
    if wall and "goodput" in last:  # earlier versions recorded no wall time
        rows += [("wall time", duration(wall)), ("goodput", f"{last['goodput']:.2%}")]
        rows += [(f"  {name}", f"{seconds / wall:.2%}") for name, seconds in spent.items() if name != _USEFUL]
    return rows


_USEFUL = "steps"
_PARTS = {
    "start_seconds": "starts",
    "save_stall_seconds": "saves",
    "evaluation_seconds": "evaluation",
    "other_seconds": "other",
}


def _seconds(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What the time of a line was spent on."""
    step, wait = record.get("step_seconds", 0.0), record.get("data_wait_seconds", 0.0)
    yield ("skipped steps" if "skipped" in record else _USEFUL), step - wait
    yield "waits for data", wait
    for key, name in _PARTS.items():
        if key in record:
            yield name, record[key]
