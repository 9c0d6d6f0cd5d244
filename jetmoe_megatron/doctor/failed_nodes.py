"""A file for each sick node, in a folder of the job script, which leaves these nodes out of the next start."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.atomic import replacing
from data_tools.printing import say
from jetmoe_megatron.doctor.findings import Finding
from jetmoe_megatron.stopping import FAILED_NODES


def leave_failed_nodes(findings: Sequence[Finding]) -> None:
    """Named after the node, with the lines of what was found there. Nothing if the job script has no such folder. A
    folder that cannot be written gives a warning."""
    if not (folder := os.environ.get(FAILED_NODES)):
        return
    lines: dict[str, list[str]] = {}
    for finding in findings:
        if finding.node and finding.node == os.path.basename(finding.node):
            lines.setdefault(finding.node, []).append(f"{finding}\n")
    if not lines:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for node, texts in lines.items():
            with replacing(Path(folder) / node) as file:
                file.write("".join(texts).encode())
    except OSError as error:
        say(f"warning: {FAILED_NODES}: {error}", sys.stderr)
