"""What a run may change against the checkpoint that it continues, and what to do about the rest."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

from jetmoe_megatron.checkpoint.saved_run import MODEL_FILE, SavedRun
from jetmoe_megatron.config.load import load_sections
from jetmoe_megatron.config.schema import Model, Run, Section


class _Way(IntEnum):
    """How to change a key against the checkpoint. A later way also works for the keys of the earlier ways."""

    NOTHING = 0  # nothing to do: later losses do not depend on it
    OPTION = 1  # checkpoint.may_change
    BRANCH = 2  # another run that starts from the checkpoint: the position in the data means something else
    WEIGHTS = 3  # another run that starts from the weights only
    NEW = 4  # impossible: it is another model


# The longest listed prefix of a key counts.
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
    """Each key that `run` may not change but did, with a text that shows its old and new value."""
    now, permitted = run.model_dump(), tuple(run.checkpoint.may_change)
    before = saved.model_dump()
    found = [pair for section in sections for pair in _differences(section, before[section], now[section])]
    return {key: text for key, text in found if _way(key) > _Way.OPTION or not _under(key, permitted)}


def refusal(checkpoint: Path, others: dict[str, str], run: Run) -> str:
    """One line with all that `other_keys` found and what to do. The next command accepts what it proposes."""
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
    """Overrides instead of `phase`, which would end the phase before again and begin this one from its start."""
    if run.phase is None:
        return ""
    ended = run.phase - 2
    return f" phase=null phases.{ended}.tokens={run.phases[ended].tokens}"


def other_model(weights: Path, run: Run) -> dict[str, str]:
    """Like `other_keys`, for the shape of a checkpoint of weights only. Its tensors do not show all of these keys.

    Raises:
        UserError: the file that describes its model cannot be read.
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
    """(key, a text with its old and new value) of each value that differs."""
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
