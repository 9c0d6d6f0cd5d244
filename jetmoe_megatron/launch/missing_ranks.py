"""Which rank did not come to which collective, from the dumps of torch's flight recorder.

torch's own analyser compares the dumps (torch/distributed/flight_recorder). Its reading of files unpickles, so they are
read here.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.printing import printable
from jetmoe_megatron.runtime.plain_pickle import read_pickle

_FILE = re.compile(r"(gloo|nccl)_(\d+)")


@dataclass(frozen=True)
class Missing:
    lines: list[str]
    ranks: list[int] = field(default_factory=list)  # those that did not come


def missing_ranks(dumps: Path) -> Missing:
    """Without lines if there are no dumps, or all ranks did the same."""
    try:
        details = {file.name: _read(file) for file in sorted(dumps.glob("*_*")) if _FILE.fullmatch(file.name)}
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        return Missing([printable(f"the dumps in {dumps} cannot be read: {error}")])
    if not details:
        return Missing([])
    try:
        line, ranks = _first_mismatch(details) or (_last_calls(details), [])
    except Exception as error:  # torch's analyser raises many kinds
        line, ranks = f"the dumps cannot be compared ({type(error).__name__})", []
    return Missing([printable(line) for line in (line, f"dumps of {len(details)} ranks: {dumps}") if line], ranks)


def _read(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    dump = json.loads(content) if file.name.startswith("gloo") else read_pickle(content, file.name, {})
    rank = int(_FILE.fullmatch(file.name)[2])  # type: ignore[index]
    known = {"host_name": f"rank{rank}", "rank": rank, "entries": dump["entries"], "version": dump["version"]}
    groups = dump["pg_config"].items()
    return known | {"pg_config": {name: {"desc": g["desc"], "ranks": _numbers(g["ranks"])} for name, g in groups}}


def _numbers(ranks: str) -> str:
    """`[0, 1]` as it is. torch's analyser would run other text as Python (builder.py, `build_groups_memberships`)."""
    numbers = json.loads(ranks)
    if type(numbers) is not list or any(type(number) is not int for number in numbers):
        raise ValueError("the ranks of a group are not numbers")
    return str(numbers)


def _first_mismatch(details: dict[str, dict[str, Any]]) -> tuple[str, list[int]] | None:
    """A line, and the ranks that did not come."""
    # The analyser is a program that prints what it finds; here its result is asked for.
    logging.getLogger("Flight Recorder").disabled = True
    from torch.distributed.flight_recorder.components.builder import build_db
    from torch.distributed.flight_recorder.components.config_manager import JobConfig

    arguments = JobConfig().parse_args(["unused", "--allow-incomplete-ranks"])
    version = next(iter(details.values()))["version"]
    for call in build_db(_not_completed(details), arguments, version).collectives:
        what = f"{call.collective_name} number {call.collective_seq_id} of the group {call.pg_desc}"
        if call.missing_ranks:
            came = sorted(set(call.expected_ranks) - set(call.missing_ranks))
            line = f"{_ranks(call.missing_ranks)} did not come to {what}, where {_ranks(came)} waited"
            return line, sorted(call.missing_ranks)
        for rank, other in sorted((call.mismatch_collectives or {}).items(), key=lambda item: item[0]):
            if other.type_of_mismatch and other.type_of_mismatch.state.name != "COLLECTIVE_STATE_MISMATCH":
                return f"{_ranks([rank])} differs from others in {what}: {other.type_of_mismatch}", []
    return None


def _not_completed(details: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without what all ranks came to: up to the last collective of each group that a rank has completed.

    A recorder holds the last calls of its rank. They begin at another collective than those of a rank with more calls,
    as on another pipeline stage; the analyser would say that one of both did not come to those before (utils.py,
    `align_trace_from_beginning`). It compares collectives only, so transfers are left out too.
    """
    completed: dict[tuple[str, str], int] = {}
    for group, entry, dump in _collectives(details):
        if entry["state"] == "completed" or _is_past(entry, dump):
            completed[group] = max(completed.get(group, 0), entry["collective_seq_id"])
    rest: dict[str, list[dict[str, Any]]] = {name: [] for name in details}
    for name, dump in details.items():
        for group, entry, _ in _collectives({name: dump}):
            if entry["collective_seq_id"] > completed.get(group, 0):
                rest[name].append(entry | {"record_id": len(rest[name])})
    return {name: dump | {"entries": rest[name]} for name, dump in details.items()}


def _is_past(entry: dict[str, Any], dump: dict[str, Any]) -> bool:
    """Whether a rank went on after a call over gloo, which never counts as completed. Only the last can have failed."""
    return entry["profiling_name"].startswith("gloo:") and entry is not dump["entries"][-1]


def _collectives(
    details: dict[str, dict[str, Any]],
) -> Iterator[tuple[tuple[str, str], dict[str, Any], dict[str, Any]]]:
    """(name and ranks of the group, entry, the dump that it is in)"""
    for dump in details.values():
        for entry in dump["entries"]:
            if not entry["is_p2p"]:
                name = entry["process_group"][0]
                yield (name, dump["pg_config"][name]["ranks"]), entry, dump


def _last_calls(details: dict[str, dict[str, Any]]) -> str:
    """Where the ranks with a dump were, if the one that did not come has none."""
    where: dict[str, list[int]] = {}
    for dump in details.values():
        if dump["entries"]:
            last = dump["entries"][-1]
            number = last["p2p_seq_id"] if last["is_p2p"] else last["collective_seq_id"]
            call = f"{last['profiling_name']} number {number} of the group {':'.join(last['process_group'])}"
            where.setdefault(call, []).append(dump["rank"])
    return "; ".join(f"last call of {_ranks(ranks)}: {call}" for call, ranks in where.items())


def _ranks(ranks: Any) -> str:
    return f"rank {', '.join(map(str, sorted(ranks)))}"
