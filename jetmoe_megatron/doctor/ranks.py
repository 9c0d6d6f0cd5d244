"""`jetmoe doctor --ranks`: what each rank of a job can do, and which one is slow, different or broken."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroup

from data_tools.printing import printable
from jetmoe_megatron.config.describe import describe_layout
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Parallel, Run
from jetmoe_megatron.doctor import nvidia_smi
from jetmoe_megatron.doctor.can_join import cannot_join, unusable, why_unusable
from jetmoe_megatron.doctor.clocks import clock_offset
from jetmoe_megatron.doctor.disk import checkpoint_bytes, measure_disk
from jetmoe_megatron.doctor.facts import RankFacts, gpu_of_rank, named_gpus
from jetmoe_megatron.doctor.failed_nodes import leave_failed_nodes
from jetmoe_megatron.doctor.findings import Finding
from jetmoe_megatron.doctor.group_rates import group_rates
from jetmoe_megatron.doctor.judge import judge
from jetmoe_megatron.doctor.own_rates import own_rates
from jetmoe_megatron.doctor.pair_rates import chains, pair_rates
from jetmoe_megatron.doctor.report import Report, keep
from jetmoe_megatron.model.config import DTYPE
from jetmoe_megatron.runtime.clock import utc_now
from jetmoe_megatron.runtime.device import be_a_world_of_one, has_gpu, process_group
from jetmoe_megatron.runtime.machine import Machine, node_name, spelled, this_machine
from jetmoe_megatron.runtime.meeting import DifferentRanks, Judge, meet
from jetmoe_megatron.runtime.rank_0 import decided_by_rank_0
from jetmoe_megatron.runtime.roll_call import roll_call
from jetmoe_megatron.runtime.time_limits import set_time_limit
from jetmoe_megatron.stopping import FAILED_NODES, ExitStatus
from jetmoe_megatron.training.ranks.process_groups import joined_groups
from jetmoe_megatron.training.ranks.same_run import code_digest, run_digest
from jetmoe_megatron.training.ranks.warm_up import groups_of


def examine_ranks(run: Run | None, layout: Layout | None, tolerance: float, disk_bytes: int) -> int:
    """All ranks call it. Returns 0 if nothing is wrong, otherwise 5.

    Args:
        run, layout: whose groups and disk are measured; without them, all ranks as one group.
        tolerance: `judge.judge`.
        disk_bytes: most that a node writes.

    Raises:
        SharedError: another rank was refused.
        SystemExit: with status 4, after a line on stderr that names the ranks that did not come or answer.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):  # end at once, also in a call of gloo or NCCL: nothing is half-done
        signal.signal(signum, signal.SIG_DFL)
    be_a_world_of_one()
    parallel = run.parallel if run else Parallel()
    what = partial(
        Report,
        utc_now(),
        describe_layout(layout) if layout else "no run file: one group of all ranks",
        precision=_precision(run),
        tolerance=tolerance,
    )
    folder = RunFolder.of(run).doctor if run else None
    refused: list[Finding] = []
    came: list[RankFacts] = []

    def difference(machines: Sequence[tuple[str, Machine]]) -> str | None:
        """Called on rank 0."""
        came.extend(RankFacts(rank, node, runs_on=_named(machine)) for rank, (node, machine) in enumerate(machines))
        refused.extend(cannot_join(machines))
        return str(refused[0]) if refused else None

    try:
        if reason := why_unusable(run.device if run else "auto"):
            meet(parallel.start_timeout_minutes, difference, replace(this_machine(), device=unusable(reason)))
        with _groups(run, layout, difference) as groups:
            set_time_limit(parallel.timeout_minutes)
            ranks = _examine(run, groups, disk_bytes, parallel.timeout_minutes)
            report = what(findings=judge(ranks, tolerance), ranks=ranks)
            is_well = decided_by_rank_0(lambda: _tell(report, folder))
    except DifferentRanks:
        if came:
            _tell(what(findings=refused, ranks=came), folder)
        is_well = False
    return ExitStatus.DONE if is_well else ExitStatus.SICK_RANK


@contextlib.contextmanager
def _groups(run: Run | None, layout: Layout | None, judge: Judge) -> Iterator[dict[str, ProcessGroup | None]]:
    if run and layout:
        with joined_groups(run, layout, judge):
            yield groups_of(run)
    else:
        with process_group(Parallel().start_timeout_minutes, judge):
            yield {"all ranks": torch.distributed.group.WORLD}


def _precision(run: Run | None) -> str:
    return run.precision if run else "bf16" if has_gpu() else "fp32"


def _examine(
    run: Run | None, groups: Mapping[str, ProcessGroup | None], disk_bytes: int, minutes: float
) -> list[RankFacts]:
    """What all ranks have found out."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    nodes = _of_all_ranks(node_name())
    is_first = nodes.index(nodes[rank]) == rank
    own = RankFacts(rank, nodes[rank], runs_on=_runs_on(run))
    own.gpu, own.uuid = gpu_of_rank()
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    default: Any = torch.distributed.distributed_c10d._get_default_store()
    store = PrefixStore(f"clocks {start}", default)
    asked: list[Any] = []

    def clock() -> None:
        own.clock = clock_offset(store, rank, world)

    def ask() -> None:
        asked.append(nvidia_smi.start() if is_first and has_gpu() else None)

    def hear() -> None:
        own.gpus, own.no_gpus = nvidia_smi.answer(asked[0])

    def pairs(kind: str, its_chains: Sequence[Sequence[int]], group: ProcessGroup | None = None) -> None:
        own.pairs[kind] = list(pair_rates(its_chains, group).items())

    def disk() -> None:
        if run and is_first:
            own.disk = measure_disk(RunFolder.of(run).root, min(disk_bytes, checkpoint_bytes(run) // len(set(nodes))))

    steps: dict[str, Callable[[], None]] = {"clocks": clock, "start of nvidia-smi": ask}
    for name, measure in own_rates(DTYPE[_precision(run)]).items():
        steps[name] = partial(_note, own.rates, name, measure)
    steps["nvidia-smi"] = hear
    for name, measure_group in group_rates(groups).items():
        steps[name] = partial(_note, own.groups, name, measure_group)
    for kind, its_chains in chains(nodes).items():
        steps[kind] = partial(pairs, kind, its_chains)
    if (stages := groups.get("pipeline")) is not None and stages.size() > 1:
        chain = torch.distributed.get_process_group_ranks(stages)
        steps["pipeline neighbours"] = partial(pairs, "pipeline neighbours", [chain], stages)
    steps["disk"] = disk
    with roll_call(f"doctor {start}", list(steps), minutes) as arrive:
        for name, step in steps.items():
            arrive(name)
            torch.distributed.barrier()  # all measure the same at the same time
            step()
    return named_gpus(_of_all_ranks(own))


def _note(where: dict[str, Any], name: str, measure: Callable[[], Any]) -> None:
    if (result := measure()) is not None:
        where[name] = result


def _of_all_ranks(value: Any) -> list[Any]:
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def _runs_on(run: Run | None) -> dict[str, str]:
    return {
        **_named(this_machine()),
        "Python": platform.python_version(),
        "code": code_digest()[:12],
        "run file": run_digest(run)[:12] if run else "",
    }


def _named(machine: Machine) -> dict[str, str]:
    return {spelled(name): value for name, value in asdict(machine).items()}


def _tell(report: Report, folder: Path | None) -> bool:
    """On rank 0: print, keep in the run folder, leave the names of sick nodes. Returns whether nothing is wrong."""
    kept = None
    try:
        kept = keep(report, folder) if folder else None
    except OSError as error:
        if not (report.ranks[0].disk and report.ranks[0].disk.problem):  # which is the same fault
            what = f"{folder}: this table cannot be kept there: {error.strerror or error}"
            report = replace(report, findings=[*report.findings, Finding(str(report.ranks[0]), what)])
    print(report, flush=True)
    if kept:
        print(f"kept: {printable(str(kept))}", flush=True)
    for finding in report.findings:
        print(finding, file=sys.stderr, flush=True)
    try:
        leave_failed_nodes(report.findings)
    except OSError as error:
        print(f"warning: {FAILED_NODES}: {printable(str(error))}", file=sys.stderr, flush=True)
    return not report.findings
