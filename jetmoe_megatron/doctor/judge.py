"""From what all ranks found out to what is wrong. All ranks come to the same findings."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from data_tools.units import shown
from jetmoe_megatron.doctor.facts import RankFacts, group_rates_of, pair_rates_of
from jetmoe_megatron.doctor.findings import Finding
from jetmoe_megatron.doctor.own_rates import unit_of

CLOCKS_DIFFER_BY = 1.0  # seconds: lines of different nodes would be in a wrong order
_Key = TypeVar("_Key")
_Pair = tuple[int, int]


def judge(ranks: Sequence[RankFacts], tolerance: float) -> list[Finding]:
    """tolerance: a rate is bad below (1 - tolerance) times the median of its kind."""
    return [
        *_different(ranks),
        *_wrong_clocks(ranks),
        *_slow_ranks(ranks, tolerance),
        *_slow_connections(ranks, tolerance),
        *_bad_disks(ranks, tolerance),
        *_bad_gpus(ranks),
    ]


def _different(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """If two values are equally frequent, rank 0 is right."""
    for name in ranks[0].runs_on:
        usual, number = Counter(rank.runs_on[name] for rank in ranks).most_common(1)[0]
        for rank in ranks:
            if (own := rank.runs_on[name]) != usual:
                what = f"{name} {own or 'none'}, {number} of {len(ranks)} ranks have {usual or 'none'}"
                yield Finding(str(rank), what, rank.node)


def _wrong_clocks(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Of each node, against the median clock: rank 0's may be the wrong one. Only a warning: times in logs are
    wrong, numbers are not."""
    clocks = {rank.node: (rank, rank.clock) for rank in reversed(ranks) if rank.clock}
    middle = statistics.median_low([clock.ahead for _, clock in clocks.values()]) if clocks else 0.0
    for rank, clock in reversed(clocks.values()):
        off = clock.ahead - middle
        if abs(off) - clock.error > CLOCKS_DIFFER_BY:
            what = f"its clock is {abs(off):.1f} s {'ahead' if off > 0 else 'behind'}"
            yield Finding(str(rank), what, kind="warning")


def _slow_ranks(ranks: Sequence[RankFacts], tolerance: float) -> Iterator[Finding]:
    for name in ranks[0].rates:
        slow, median = _slow({rank.rank: rank.rates[name] for rank in ranks}, tolerance)
        for number, rate in slow.items():
            what = _compared(name, rate, median, unit_of(name))
            yield Finding(str(ranks[number]), what, ranks[number].node)


def _slow_connections(ranks: Sequence[RankFacts], tolerance: float) -> Iterator[Finding]:
    """A slow group is a finding if no rank in it was found by its pairs."""
    named: set[int] = set()
    for kind, rates in pair_rates_of(ranks).items():
        slow, median = _slow(rates, tolerance)
        culprits = _in_every_slow_pair(rates, slow)
        for number, rate in culprits.items():
            what = _compared(f"each of its {kind}", rate, median, "B/s")
            yield Finding(str(ranks[number]), what, ranks[number].node)
        named |= culprits.keys()
        for pair, rate in slow.items():
            if not culprits.keys() & set(pair):
                named |= set(pair)
                yield _of_several(ranks, pair, _compared(kind, rate, median, "B/s"))
    for kind, rates_of in group_rates_of(ranks).items():
        alike: dict[tuple[int, int], dict[tuple[int, ...], float]] = {}
        for members, rate in rates_of.items():
            spread = len(members), len({ranks[member].node for member in members})
            alike.setdefault(spread, {})[members] = rate
        for rates_alike in alike.values():
            slow_groups, median = _slow(rates_alike, tolerance)
            for members, rate in slow_groups.items():
                if not named & set(members):
                    yield _of_several(ranks, members, _compared(kind, rate, median, "B/s"))


def _bad_disks(ranks: Sequence[RankFacts], tolerance: float) -> Iterator[Finding]:
    """A slow disk is only a warning: other jobs may use it now, and training waits only for its own saves. If no node
    can write, the file system is to blame, and not a node."""
    disks = {rank.rank: rank.disk for rank in ranks if rank.disk}
    works = {number: disk for number, disk in disks.items() if not disk.problem}
    for number, disk in disks.items():
        if disk.problem:
            what = f"a file in {disk.folder} (output_dir): {disk.problem}"
            yield Finding(str(ranks[number]), what, ranks[number].node if works else "")
    for name in ("written", "read"):
        slow, median = _slow({number: getattr(disk, name) for number, disk in works.items()}, tolerance)
        for number, rate in slow.items():
            what = _compared(f"a file in {works[number].folder} (output_dir) {name} with", rate, median, "B/s")
            yield Finding(str(ranks[number]), what, kind="warning")


def _bad_gpus(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    known = {gpu.uuid.removeprefix("GPU-"): gpu for rank in ranks for gpu in rank.gpus}
    for rank in ranks:
        if gpu := known.get(rank.uuid):
            for problem in gpu.problems():
                yield Finding(str(rank), problem, rank.node)


def _slow(rates: Mapping[_Key, float], tolerance: float) -> tuple[dict[_Key, float], float]:
    """Those that are too far below the median, and the median. Of an even number, it is the higher one in the middle:
    of two ranks, the better one."""
    if not rates:
        return {}, 0.0
    median = statistics.median_high(rates.values())
    return {key: rate for key, rate in rates.items() if rate < (1 - tolerance) * median}, median


def _in_every_slow_pair(rates: Mapping[_Pair, float], slow: Mapping[_Pair, float]) -> dict[int, float]:
    """Ranks with two pairs or more that are all slow, and the best rate of these."""
    pairs_of: dict[int, list[_Pair]] = {}
    for pair in rates:
        for rank in pair:
            pairs_of.setdefault(rank, []).append(pair)
    all_slow = {rank for rank, pairs in pairs_of.items() if len(pairs) > 1 and all(pair in slow for pair in pairs)}
    return {rank: max(slow[pair] for pair in pairs_of[rank]) for rank in sorted(all_slow)}


def _of_several(ranks: Sequence[RankFacts], members: Sequence[int], what: str) -> Finding:
    nodes = list(dict.fromkeys(ranks[member].node for member in members))
    numbers = ", ".join(map(str, members))
    return Finding(f"rank {numbers} on {', '.join(nodes)}", what, nodes[0] if len(nodes) == 1 else "")


def _compared(name: str, rate: float, median: float, unit: str) -> str:
    return f"{name} {shown(rate, unit)}, median {shown(median, unit)}"
