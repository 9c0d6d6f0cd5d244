"""The table of all ranks: printed by rank 0, and kept in the run folder as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.atomic import replacing
from data_tools.printing import printable
from jetmoe_megatron.doctor.facts import RankFacts
from jetmoe_megatron.doctor.findings import Finding
from jetmoe_megatron.doctor.own_rates import unit_of
from jetmoe_megatron.doctor.units import shown


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
        return "\n".join(map(printable, self._lines()))

    def _lines(self) -> Iterator[str]:
        ranks = self.ranks
        yield f"# jetmoe doctor, {self.when}"
        yield ""
        yield f"{len(ranks)} ranks on {len({rank.node for rank in ranks})} nodes; {self.layout}; {self.precision}; "
        yield f"a rate is bad if it is more than {self.tolerance:.0%} below the median."
        yield ""
        yield from [f"- {finding}" for finding in self.findings] or ["Nothing is wrong."]
        yield ""
        yield f"Rank 0 has: {', '.join(f'{name} {value}' for name, value in ranks[0].runs_on.items() if value)}"
        yield ""
        rates = list(dict.fromkeys(name for rank in ranks for name in rank.rates))
        rows = [[str(rank.rank), rank.node, rank.gpu, *_own(rank, rates), _clock(rank)] for rank in ranks]
        yield from _table(["rank", "node", "GPU", *rates, "clock"], rows)
        yield from _connections("group", "ranks", [(k, *v) for rank in ranks for k, v in rank.groups.items()])
        pairs = [(kind, *pair) for rank in ranks for kind, found in rank.pairs.items() for pair in found]
        yield from _connections("point to point", "ranks", pairs)
        disks = [(rank.node, rank.disk) for rank in ranks if rank.disk]
        if disks:
            rows = [
                [
                    node,
                    disk.folder,
                    shown(disk.size, "B"),
                    disk.problem or shown(disk.written, "B/s"),
                    shown(disk.read, "B/s"),
                ]
                for node, disk in disks
            ]
            yield from _table(["node", "disk", "file", "written with", "read with"], rows)
        gpus = [(rank.node, gpu) for rank in ranks for gpu in rank.gpus]
        if gpus:
            titles = ["node", "GPU", "serial", "MHz", "highest MHz", "degrees C", "memory errors", "slowed by"]
            values = [
                [
                    node,
                    g.index,
                    g.serial,
                    g.clock,
                    g.highest_clock,
                    g.temperature,
                    g.memory_errors,
                    " ".join(g.slowed_by),
                ]
                for node, g in gpus
            ]
            yield from _table(titles, values)
        yield from [f"{rank.node}: {rank.no_gpus}" for rank in ranks if rank.no_gpus]


def keep(report: Report, folder: Path) -> Path:
    """Returns the Markdown file; the other has the same name and ends in .json.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = report.when.replace(":", "")
    for ending, text in ((".json", report.json()), (".md", str(report))):
        with replacing(folder / f"{name}{ending}") as file:
            file.write(f"{text}\n".encode())
    return folder / f"{name}.md"


def _own(rank: RankFacts, rates: Sequence[str]) -> list[str]:
    return [shown(rank.rates[name], unit_of(name)) if name in rank.rates else "" for name in rates]


def _clock(rank: RankFacts) -> str:
    return f"{rank.clock.ahead:+.4f} s"


def _connections(what: str, who: str, measured: Sequence[tuple[str, tuple[int, ...], float]]) -> Iterator[str]:
    """The lower one of the rates that the members have measured."""
    lowest: dict[tuple[str, tuple[int, ...]], float] = {}
    for kind, members, rate in measured:
        lowest[kind, members] = min(rate, lowest.get((kind, members), rate))
    if lowest:
        order = sorted(lowest, key=lambda key: list(dict.fromkeys(kind for kind, *_ in measured)).index(key[0]))
        rows = [[kind, ", ".join(map(str, members)), shown(lowest[kind, members], "B/s")] for kind, members in order]
        yield from _table([what, who, "rate"], rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """With aligned columns. Empty ones are left out."""
    used = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    cells = [[line[i] for i in used] for line in [titles, *rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(used))]
    lines = ["| " + " | ".join(c.ljust(width) for c, width in zip(line, widths, strict=True)) + " |" for line in cells]
    yield from [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:], ""]
