"""What rank 0 tells: the table of all ranks, printed and kept in the run folder, and a line for each finding."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_tools.atomic import replacing
from data_tools.printing import printable, say
from jetmoe_megatron.doctor import tables
from jetmoe_megatron.doctor.facts import RankFacts
from jetmoe_megatron.doctor.findings import Finding
from jetmoe_megatron.doctor.sick_nodes import record_sick_nodes


@dataclass(frozen=True)
class Report:
    when: str
    layout: str
    precision: str
    tolerance: float
    findings: Sequence[Finding]
    ranks: Sequence[RankFacts]

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        """Markdown."""
        nodes = len({rank.node for rank in self.ranks})
        versions = ", ".join(f"{name} {value}" for name, value in self.ranks[0].runs_on.items() if value)
        lines = [
            f"# jetmoe doctor, {self.when}",
            "",
            f"Ranks: {len(self.ranks)} on {nodes} node{'s' * (nodes > 1)}. Layout: {self.layout}. Precision: "
            f"{self.precision}. A rate is bad if it is more than {self.tolerance:.0%} below the median.",
            "",
            *[f"- {finding}" for finding in self.findings],
            *([] if self.findings else ["Nothing is wrong."]),
            "",
            f"Rank 0 has {versions}.",
            "",
            *tables.of_ranks(self.ranks),
            *tables.of_groups(self.ranks),
            *tables.of_pairs(self.ranks),
            *tables.of_disks(self.ranks),
            *tables.of_gpus(self.ranks),
        ]
        return "\n".join(map(printable, lines))


def tell(report: Report, folder: Path | None) -> bool:
    """Print the report, keep it in the folder, and leave the names of sick nodes. Returns whether no rank is sick."""
    kept = None
    try:
        kept = _keep(report, folder) if folder else None
    except OSError as error:
        if not ((disk := report.ranks[0].disk) and disk.problem):  # which is the same fault
            what = f"the table cannot be kept in {folder}: {error.strerror or error}"
            report = replace(report, findings=[*report.findings, Finding(str(report.ranks[0]), what, kind="warning")])
    print(report, flush=True)
    if kept:
        say(f"kept: {kept}")
    for finding in report.findings:
        say(finding, sys.stderr)
    record_sick_nodes(report.findings)
    return all(finding.kind == "warning" for finding in report.findings)


def _keep(report: Report, folder: Path) -> Path:
    """Returns the Markdown file; the other has the same name and ends in .json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.when.replace(':', '')}.md"
    for file, text in ((path.with_suffix(".json"), report.json()), (path, str(report))):
        with replacing(file) as stream:
            stream.write(f"{text}\n".encode())
    return path
