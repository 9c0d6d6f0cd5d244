"""Looks for the layout with the shortest step: rehearses the run's own, then what is one change away from the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from data_tools.parallel import WorkerProcesses
from jetmoe_megatron.config.hardware import Hardware
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.plan.estimate import with_slack
from jetmoe_megatron.plan.plan import Plan, make_plan, plan_ends
from jetmoe_megatron.plan.settings import Settings, legal, needs_more, neighbours
from jetmoe_megatron.plan.world import kept_on_the_first_stage

MOST = 64
SHOWN = 5  # of the best


@dataclass(frozen=True)
class Tried:
    settings: Settings
    plan: Plan | None  # None: what a rank keeps between steps is more than its memory
    kept: int  # bytes that a rank of the first stage keeps

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.verdict == "fits"

    @property
    def seconds(self) -> float:
        return self.plan.estimate.step_seconds if self.plan else float("inf")


@dataclass(frozen=True)
class Found:
    """Best first: those that fit by the time of a step, then the others."""

    own: Tried | None  # the run as it is; None if the number of GPUs does not allow it
    tried: list[Tried]

    @property
    def best(self) -> list[Tried]:
        return [tried for tried in self.tried if tried.fits]


def search(
    run: Run,
    gpus: int,
    hardware: Hardware,
    imbalance: float,
    processes: WorkerProcesses,
    progress: Callable[[int, int], None],
    most: int = MOST,
) -> Found:
    """
    Args:
        progress: is called with the number of layouts that were looked at, and with `most`.
        most: layouts that are looked at, at most.

    Raises:
        UserError: no layout of the run divides so many GPUs.
    """
    own = Settings.of(run)
    waiting, tried, looked_at = list(_starts(run, own, gpus)), dict[Settings, Tried](), set[Settings]()
    if not waiting:
        raise UserError(f"--gpus: no layout of this run's model and batch divides {gpus} GPUs")
    while waiting:
        for one in _try(run, waiting[: most - len(tried)], gpus, hardware, imbalance, processes):
            tried[one.settings] = one
            progress(len(tried), most)
        waiting = []
        while not waiting and len(tried) < most:
            new = [one for one in tried.values() if one.settings not in looked_at]
            if not new:
                break
            best = min(new, key=_promise)
            looked_at.add(best.settings)
            near = (s for s in neighbours(run, best.settings, gpus) if _is_worth_a_look(s, best))
            waiting = [settings for settings in near if settings not in tried]
    for one in [*sorted(tried.values(), key=_order)[:SHOWN], *([tried[own]] if own in tried else [])]:
        if one.plan is not None:  # so that `jetmoe plan` says the same of it
            tried[one.settings] = replace(one, plan=make_plan(one.plan.run, gpus, hardware, imbalance, processes))
    return Found(tried.get(own), sorted(tried.values(), key=_order))


def _starts(run: Run, own: Settings, gpus: int) -> Iterator[Settings]:
    """The run's own, and for each legal number of stages the one that divides nothing else."""
    if legal(run, own, gpus):
        yield own
    for pipeline in range(1, run.model.num_layers + 1):
        plain = Settings(1, pipeline, 1, 1, 1, "replicated", 1, "none")
        if plain != own and legal(run, plain, gpus):
            yield plain


def _try(
    run: Run, all_settings: list[Settings], gpus: int, hardware: Hardware, imbalance: float, processes: WorkerProcesses
) -> Iterator[Tried]:
    runs = [settings.apply(run) for settings in all_settings]
    cases = [(one, _layout(run, settings, gpus)) for one, settings in zip(runs, all_settings, strict=True)]
    kept = list(kept_on_the_first_stage(cases, processes))
    can_fit = [case for case, size in zip(cases, kept, strict=True) if _can_fit(hardware, size)]
    plans = plan_ends(can_fit, hardware, imbalance, processes)
    for settings, size in zip(all_settings, kept, strict=True):
        yield Tried(settings, next(plans) if _can_fit(hardware, size) else None, size)


def _can_fit(hardware: Hardware, kept: int) -> bool:
    return with_slack(hardware, kept) < hardware.memory_gb * 1e9


def _layout(run: Run, settings: Settings, gpus: int) -> Layout:
    layout = legal(run, settings, gpus)
    assert layout is not None
    return layout


def _is_worth_a_look(settings: Settings, beside: Tried) -> bool:
    """Less memory, if it does not fit. If it does: not computing more again alone, which saves memory and no time."""
    if beside.fits:
        return settings != replace(beside.settings, recompute=settings.recompute)
    return not needs_more(settings, beside.settings)


def _order(tried: Tried) -> tuple[bool, float, int]:
    return not tried.fits, tried.seconds, tried.kept


def _promise(tried: Tried) -> tuple[float, int]:
    """Smallest first. One that is fast, but does not fit, is worth a look: what saves memory is one change away."""
    return tried.seconds, tried.kept
