"""In what a run may differ from the checkpoint that it continues, and how to get what it may not."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

from jetmoe_megatron.checkpoint.saved_run import MODEL_FILE, SavedRun
from jetmoe_megatron.config.load import load_sections
from jetmoe_megatron.config.schema import Model, Run, Section


class _Way(IntEnum):
    """How a run gets another value of a key than a checkpoint has: a later one serves for the keys of the earlier."""

    NOTHING = 0  # the losses to come do not depend on it
    OPTION = 1  # checkpoint.may_change
    BRANCH = 2  # a run of its own that starts from the checkpoint: the position in the data means something else
    WEIGHTS = 3  # a run of its own that starts from the weights alone
    NEW = 4  # none: it is another model


# Of a key the longest beginning that is here counts.
_WAYS = {
    "seed": _Way.BRANCH,
    "model": _Way.NEW,
    "model.init_std": _Way.NOTHING,
    "model.expert_backend": _Way.NOTHING,
    "model.rope_theta": _Way.WEIGHTS,
    "model.norm_eps": _Way.WEIGHTS,
    "model.top_k": _Way.WEIGHTS,
    "losses": _Way.OPTION,
    "precision": _Way.WEIGHTS,
    "batch": _Way.BRANCH,
    "batch.micro_sequences": _Way.NOTHING,
    "optimizer": _Way.OPTION,
    "schedule": _Way.OPTION,
    "phases": _Way.OPTION,
}


def other_keys(saved: Section, run: Run, sections: Iterable[str] = SavedRun.model_fields) -> dict[str, str]:
    """Each key in which `run` differs from what was saved and may not, with what it was and is."""
    now, permitted = run.model_dump(), tuple(run.checkpoint.may_change)
    before = saved.model_dump()
    found = [pair for section in sections for pair in _differences(section, before[section], now[section])]
    return {key: text for key, text in found if _way(key) > _Way.OPTION or not _under(key, permitted)}


def refusal(checkpoint: Path, others: dict[str, str], run: Run) -> str:
    """One line for what `other_keys` found: all of it, and what to do, which the next command accepts."""
    way = max(map(_way, others))
    if way is _Way.OPTION:
        advice = f"permit it with checkpoint.may_change=[{','.join(others)}]"
    elif way is _Way.BRANCH:
        advice = f"begin another run there: start_from={checkpoint}{_in_its_phase(run)} with its own output_dir"
    elif way is _Way.WEIGHTS:
        advice = (
            f"begin another run with the weights alone: `jetmoe convert to-hf {checkpoint} HF`, `jetmoe convert "
            "from-hf HF WEIGHTS`, then start_from=WEIGHTS, without phase and with its own output_dir"
        )
    else:
        advice = "train this other model from its beginning: without start_from, and with its own output_dir"
    return f"{checkpoint}: differs from the saved run in {'; '.join(others.values())}. Set it back, or {advice}"


def _in_its_phase(run: Run) -> str:
    """`phase` would end the phase before once more, and begin the whole of this one."""
    if run.phase is None:
        return ""
    ended = run.phase - 2
    return f" phase=null phases.{ended}.tokens={run.phases[ended].tokens}"


def other_model(weights: Path, run: Run) -> dict[str, str]:
    """As `other_keys`, for a checkpoint of weights alone: the keys of the shape. Of a few its tensors do not tell.

    Raises:
        UserError: what it says of its model cannot be read.
    """
    file = weights / MODEL_FILE
    if not file.is_file():
        return {}
    before, now = load_sections(file, Model).model_dump(), run.model.model_dump()
    return {key: text for key, text in _differences("model", before, now) if _way(key) is _Way.NEW}


def _way(key: str) -> _Way:
    while key not in _WAYS:
        key, dot, _ = key.rpartition(".")
        if not dot:
            raise KeyError(f"may_change._WAYS has no {key}")
    return _WAYS[key]


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _differences(key: str, saved: Any, now: Any) -> list[tuple[str, str]]:
    """(key, what it was and is) of each value that differs."""
    # Data has its own fingerprint.
    if key.endswith(".data") or _way(key) is _Way.NOTHING:
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        return [found for name in now for found in _differences(f"{key}.{name}", saved.get(name), now[name])]
    if isinstance(saved, list) and isinstance(now, list):
        entries = enumerate(zip(saved, now, strict=False))
        found = [difference for i, pair in entries for difference in _differences(f"{key}.{i}", *pair)]
        lengths = f"{key} (saved {len(saved)} of them, now {len(now)})"
        return found + ([] if len(saved) == len(now) else [(key, lengths)])
    return [] if saved == now else [(key, f"{key} (saved {saved!r}, now {now!r})")]
