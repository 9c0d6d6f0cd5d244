"""The name by which a tracker finds a run again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from jetmoe_megatron.config.schema import Run


def run_id(run: Run) -> str:
    """The same for the same run folder, so that a resumed run continues its own charts."""
    digest = hashlib.sha256(str(Path(run.output_dir).resolve()).encode()).hexdigest()
    return f"{''.join(c if c.isalnum() else '-' for c in run.name)[:40]}-{digest[:8]}"
