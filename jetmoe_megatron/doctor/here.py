"""`jetmoe doctor` without ranks: this machine."""

from __future__ import annotations

from collections.abc import Sequence

from data_tools.printing import say
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.doctor.host import host_limits
from jetmoe_megatron.doctor.known_conflicts import conflicts, this_stack
from jetmoe_megatron.doctor.packages import installed, why_not_importable
from jetmoe_megatron.doctor.problems import Problem
from jetmoe_megatron.runtime.machine import version_of
from jetmoe_megatron.stopping import ExitStatus


def examine_here(run: Run | None) -> int:
    """Print what is installed and used, the limits of the host, what is wrong, and what to do.

    Returns 0, or 5 if something is known not to work.

    Raises:
        UserError: the run file asks for what no number of ranks can do.
    """
    problems = conflicts(this_stack(run.parallel.moe_token_dispatcher if run else "alltoall"))
    _show("installed", installed())
    if why := why_not_importable("megatron.core"):
        if version_of("megatron-core"):  # else it has been said
            mend = "bash scripts/install_gpu.sh, or on a machine without a GPU: make install"
            problems.append(Problem("wrong", "Megatron-Core cannot be imported", why, mend))
    else:
        problems += _show_use(run)
    limits, low = host_limits()
    _show("host", limits)
    problems += low
    for problem in problems:
        say(problem)
    if problems:
        say("to mend it:")
    for mend in dict.fromkeys(problem.mend for problem in problems):
        say(f"  {mend}")
    if any(problem.kind == "wrong" for problem in problems):
        return ExitStatus.SICK_RANK
    say("nothing is known to be wrong")
    return ExitStatus.DONE


def _show_use(run: Run | None) -> list[Problem]:
    """Returns what is refused."""
    from jetmoe_megatron.doctor.in_use import in_use  # needs Megatron-Core
    from jetmoe_megatron.doctor.run_disk import disk_of

    answers, refused = in_use(run)
    if run is None:
        _show("used (name a run file to see the experts' and the attention's)", answers)
        return refused
    disk, full = disk_of(run)
    _show("used by this run", [*answers, *disk])
    return [*refused, *full]


def _show(title: str, rows: Sequence[tuple[str, str]]) -> None:
    say(title)
    for name, value in rows:
        say(f"  {name:24} {value}")
    say("")
