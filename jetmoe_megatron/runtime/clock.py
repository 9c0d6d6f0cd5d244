"""The time, in the format of the logs."""

from __future__ import annotations

from datetime import datetime, timezone


def utc_now() -> str:
    """`2026-11-28T22:17:05Z`."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
