"""The nodes of findings, as `runtime/failed_nodes.py` takes them: the next start of a job leaves them out."""

from __future__ import annotations

from collections.abc import Sequence

from jetmoe_megatron.doctor.findings import Finding
from jetmoe_megatron.runtime.failed_nodes import record


def record_sick_nodes(findings: Sequence[Finding]) -> None:
    """With all that was found on a node as the reason."""
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        if finding.node:
            reasons.setdefault(finding.node, []).append(str(finding))
    for node, lines in reasons.items():
        record(node, "; ".join(lines))
