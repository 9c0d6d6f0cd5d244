"""What a report takes from the resolved configurations of runs, which may be of other versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from jetmoe_megatron.config.schema import Phase

_MOST = 500  # rows


def asked_shares(config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The mixture of each phase; empty if the configuration does not say."""
    phases = config.get("phases")
    try:
        found = [Phase.model_validate(phase) for phase in phases] if isinstance(phases, list) else []
        return {phase.name: phase.shares for phase in found}
    except (ValidationError, ZeroDivisionError):
        return {}


def differences(configs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each dotted key whose values differ: the key, and the value of each run; nothing where it has none."""
    flat = [dict(_flat(config)) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [[key, *(one.get(key, "") for one in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1][:_MOST]


def _flat(node: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, (dict, list)) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _flat(value, f"{where}.{key}".lstrip("."))
    else:
        yield where, "null" if node is None else str(node)
