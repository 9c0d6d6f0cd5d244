"""The numbers of all ranks as tables in Markdown, with aligned columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from data_tools.text_table import table
from data_tools.units import shown
from jetmoe_megatron.doctor.facts import RankFacts, group_rates_of, pair_rates_of
from jetmoe_megatron.doctor.own_rates import unit_of

_Members = TypeVar("_Members", bound=tuple[int, ...])


def of_ranks(ranks: Sequence[RankFacts]) -> Iterator[str]:
    names = list(dict.fromkeys(name for rank in ranks for name in rank.rates))
    rows = []
    for rank in ranks:
        rates = [shown(rank.rates[name], unit_of(name)) if name in rank.rates else "" for name in names]
        rows.append([str(rank.rank), rank.node, rank.gpu, *rates, f"{rank.clock.ahead:+.4f} s" if rank.clock else ""])
    return table(["rank", "node", "GPU", *names, "clock"], rows)


def of_groups(ranks: Sequence[RankFacts]) -> Iterator[str]:
    return _connections("group", group_rates_of(ranks))


def of_pairs(ranks: Sequence[RankFacts]) -> Iterator[str]:
    return _connections("point to point", pair_rates_of(ranks))


def of_disks(ranks: Sequence[RankFacts]) -> Iterator[str]:
    rows = []
    for rank in ranks:
        if disk := rank.disk:
            rates = ["", ""] if disk.problem else [shown(disk.written, "B/s"), shown(disk.read, "B/s")]
            rows.append([rank.node, disk.folder, shown(disk.size, "B"), *rates, disk.problem])
    return table(["node", "disk", "file", "written", "read", "problem"], rows)


def of_gpus(ranks: Sequence[RankFacts]) -> Iterator[str]:
    """What nvidia-smi told, or why it did not."""
    rows = []
    for rank in ranks:
        for gpu in rank.gpus:
            clocks = [gpu.clock, gpu.highest_clock]
            rows.append(
                [rank.node, gpu.index, gpu.serial, *clocks, gpu.temperature, gpu.memory_errors, " ".join(gpu.slowed_by)]
            )
    yield from table(["node", "GPU", "serial", "MHz", "highest MHz", "degrees C", "memory errors", "slowed by"], rows)
    yield from [f"{rank.node}: {rank.no_gpus}" for rank in ranks if rank.no_gpus]


def _connections(what: str, rates: Mapping[str, Mapping[_Members, float]]) -> Iterator[str]:
    rows = [
        [kind, ", ".join(map(str, members)), shown(rate, "B/s")]
        for kind, its_rates in rates.items()
        for members, rate in its_rates.items()
    ]
    return table([what, "ranks", "rate"], rows)
