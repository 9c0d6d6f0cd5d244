"""Where a run ran, as far as its folder says: starts, versions that the doctor wrote down, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from jetmoe_megatron.checkpoint.folder import published
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.launch.starts import events
from jetmoe_megatron.page.markup import table, tag, words

_MOST_ROWS = 200


def origin(files: RunFolder) -> Iterator[str]:
    rows = [_start(event) for event in events(files.starts) if event["event"] in ("start", "end")]
    if rows:
        yield tag("p", words(f"{files.starts.name}:"))
        yield table(["time", "start", "event", "tokens", "nodes", "status"], rows[-_MOST_ROWS:])
    if files.doctor.is_dir():
        for path in sorted(files.doctor.glob("*.json"))[-1:]:
            try:
                versions = json.loads(path.read_text(encoding="utf-8"))["ranks"][0]["runs_on"]
                rows = [[str(name), str(value)] for name, value in versions.items() if value]
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
                continue
            yield tag("p", words(f"Rank 0, as the doctor found it ({path.name}):"))
            yield table(["what", "version"], rows)
    if found := published(files.checkpoints):
        yield tag("p", words(f"Checkpoints: {', '.join(path.name for path in found)}"))


def _start(event: dict[str, Any]) -> list[str]:
    nodes = event.get("nodes")
    named = (
        ", ".join(map(str, nodes[:8])) + (f" and {len(nodes) - 8} more" if len(nodes) > 8 else "")
        if isinstance(nodes, list)
        else ""
    )
    return [
        *(str(event.get(key, "")) for key in ("time", "start", "event", "tokens")),
        named,
        str(event.get("status", "")),
    ]
