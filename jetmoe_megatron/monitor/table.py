"""What commands print about a run."""

from __future__ import annotations

from collections.abc import Iterable

from jetmoe_megatron.errors import printable


def two_columns(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, one pair a line, safe for a terminal."""
    safe = [(printable(name), printable(value)) for name, value in rows]
    width = max(len(name) for name, _ in safe)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in safe)
