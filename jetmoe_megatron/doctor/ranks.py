"""`jetmoe doctor --ranks`: what each rank of a job can do, and which one is slow, different or broken."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.distributed import ProcessGroup

from jetmoe_megatron.config.describe import describe_layout
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Parallel, Run
from jetmoe_megatron.doctor.can_join import cannot_join, unusable, why_unusable
from jetmoe_megatron.doctor.examination import Examination, precision_of, runs_on
from jetmoe_megatron.doctor.facts import RankFacts
from jetmoe_megatron.doctor.judge import judge
from jetmoe_megatron.doctor.report import Report, tell
from jetmoe_megatron.runtime.clock import utc_now
from jetmoe_megatron.runtime.device import be_a_world_of_one, process_group
from jetmoe_megatron.runtime.machine import Machine, this_machine
from jetmoe_megatron.runtime.meeting import DifferentRanks, Judge, meet
from jetmoe_megatron.runtime.rank_0 import decided_by_rank_0
from jetmoe_megatron.runtime.time_limits import set_time_limit
from jetmoe_megatron.stopping import ExitStatus
from jetmoe_megatron.training.ranks.process_groups import joined_groups
from jetmoe_megatron.training.ranks.warm_up import groups_of


def examine_ranks(run: Run | None, layout: Layout | None, tolerance: float, disk_bytes: int) -> int:
    """All ranks call it. Returns 0 if no rank is sick, otherwise 5.

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
        precision=precision_of(run),
        tolerance=tolerance,
    )
    folder = RunFolder.of(run).doctor if run else None

    def difference(machines: Sequence[tuple[str, Machine]]) -> str | None:
        """Called on rank 0, before the others learn the answer and leave."""
        if not (refused := cannot_join(machines)):
            return None
        came = [RankFacts(rank, node, runs_on=runs_on(machine)) for rank, (node, machine) in enumerate(machines)]
        tell(what(findings=refused, ranks=came), folder)
        return str(refused[0])

    try:
        if reason := why_unusable(run.device if run else "auto"):
            meet(parallel.start_timeout_minutes, difference, this_machine(unusable(reason)))
        with _groups(run, layout, difference) as groups:
            set_time_limit(parallel.timeout_minutes)
            ranks = Examination(run, groups, disk_bytes).all_steps(parallel.timeout_minutes)
            report = what(findings=judge(ranks, tolerance), ranks=ranks)
            is_well = decided_by_rank_0(lambda: tell(report, folder))
    except DifferentRanks:
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
