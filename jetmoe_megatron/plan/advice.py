"""Single changes of a run that make it fit, or that use the memory that is left."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.parallel import WorkerProcesses
from jetmoe_megatron.plan.compare import difference, overrides
from jetmoe_megatron.plan.plan import Plan, plan_ends
from jetmoe_megatron.plan.settings import Settings, legal, saving, spending


def better_by_one_change(plan: Plan, processes: WorkerProcesses) -> list[Plan]:
    """Fastest first: those that fit, if the plan does not or hardly; else those that also take less time."""
    run, gpus = plan.run, plan.layout.world
    near = (spending if plan.verdict == "fits" else saving)(run, Settings.of(run), gpus)
    cases = [(one.apply(run), layout) for one in near if (layout := legal(run, one, gpus))]
    found = [
        other
        for other in plan_ends(cases, plan.hardware, plan.imbalance, processes)
        if other.verdict == "fits"
        and (plan.verdict != "fits" or other.estimate.step_seconds < plan.estimate.step_seconds)
    ]
    return sorted(found, key=lambda other: other.estimate.step_seconds)


def advice(plan: Plan, better: list[Plan]) -> Iterator[str]:
    """As text; `better` is of `better_by_one_change`."""
    if plan.verdict == "fits":
        yield "What is left can be used by:" if better else "No single change takes less time and fits."
    else:
        yield "It fits with:" if better else "No single change makes it fit: --search looks for several."
    for other in better:
        seconds = f"{other.estimate.step_seconds:.2f} s a step"
        left = f"{other.left:.0%} of the memory left"
        yield f"  {overrides(other.run, plan.run)}: {seconds}, {left}; {difference(other, plan)}"
