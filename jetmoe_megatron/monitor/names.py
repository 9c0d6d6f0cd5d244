"""Names of metrics in groups, as trackers draw them. `metrics.jsonl` has the names without groups."""

from __future__ import annotations

from jetmoe_megatron.monitor.monitor import Record

GROUPS = ("train", "held_out", "routers", "data", "speed", "time", "memory")
_GROUP = {
    "tokens_per_second": "speed",
    "tflops_per_rank": "speed",
    "mfu": "speed",
    "slowest_rank": "speed",
    "slowest_rank_ratio": "speed",
    "time": "time",
    "rank_hours": "time",
    "dollars": "time",
    "goodput": "time",
}


def grouped(record: Record) -> Record:
    """Numbers and words, with a group before each name: `train/lm_loss`, `routers/moa/balance_loss`."""
    return {_grouped(key): value for key, value in record.items() if isinstance(value, int | float | str)}


def _grouped(key: str) -> str:
    first, _, rest = key.partition("/")
    if rest and first in GROUPS:
        return key
    # No name may be the group of another: MLflow's folders have a file for each.
    own = rest.replace("/", ".")
    if rest and first == "grad_norm":
        return f"train/grad_norm_{own}"
    if rest and first in ("dataset_tokens", "dataset_epochs"):
        return f"data/{own}_{first.removeprefix('dataset_')}"
    if rest and first == "held_out_loss":  # the mean of all sets, `held_out_loss`, is beside the training loss
        return f"held_out/{own}"
    if rest and first == "bits_per_byte":
        return f"held_out/{own}_bits_per_byte"
    if "_memory_gb" in key:
        return f"memory/{key}"
    kind, _, name = key.partition("_")
    if kind in ("moa", "moe"):
        return f"routers/{kind}/{name}"
    return f"{_GROUP.get(key, 'time' if key.endswith('_seconds') else 'train')}/{key}"
