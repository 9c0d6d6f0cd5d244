"""Which rank did not come to which collective, from the dumps of torch's flight recorder.

torch's own analyser compares the dumps (torch/distributed/flight_recorder). Its reading of files unpickles, so they are
read here.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from data_tools.printing import printable
from jetmoe_megatron.runtime.plain_pickle import read_pickle

_FILE = re.compile(r"(gloo|nccl)_(\d+)")


def missing_ranks(dumps: Path) -> list[str]:
    """A line or two. Empty if there are no dumps, or all ranks did the same."""
    try:
        details = {file.name: _read(file) for file in sorted(dumps.glob("*_*")) if _FILE.fullmatch(file.name)}
    except (KeyError, OSError, TypeError, ValueError) as error:
        return [printable(f"the dumps in {dumps} cannot be read: {error}")]
    if not details:
        return []
    try:
        found = _first_mismatch(details)
    except Exception as error:  # torch's analyser raises many kinds
        found = f"torch's analyser failed ({type(error).__name__})"
    return [printable(line) for line in (found or _last_calls(details), f"dumps of {len(details)} ranks: {dumps}")]


def _read(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    dump = json.loads(content) if file.name.startswith("gloo") else read_pickle(content, file.name, {})
    rank = int(_FILE.fullmatch(file.name)[2])  # type: ignore[index]
    return {"host_name": f"rank{rank}", "rank": rank, **{k: dump[k] for k in ("entries", "version", "pg_config")}}


def _first_mismatch(details: dict[str, dict[str, Any]]) -> str | None:
    # The analyser is a program that prints what it finds; here its result is asked for.
    logging.getLogger("Flight Recorder").disabled = True
    from torch.distributed.flight_recorder.components.builder import build_db
    from torch.distributed.flight_recorder.components.config_manager import JobConfig

    arguments = JobConfig().parse_args(["unused", "--allow-incomplete-ranks"])
    for call in build_db(details, arguments, next(iter(details.values()))["version"]).collectives:
        what = f"{call.collective_name} number {call.collective_seq_id} of the group {call.pg_desc}"
        if call.missing_ranks:
            came = sorted(set(call.expected_ranks) - set(call.missing_ranks))
            return f"{_ranks(call.missing_ranks)} did not come to {what}, where {_ranks(came)} waited"
        if call.type_of_mismatch:
            return f"the ranks disagree about {what}: {call.type_of_mismatch}"
    return None


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
