"""What a search found, as text: YAML of the best layouts, and why each is faster or slower."""

from __future__ import annotations

import math
from collections.abc import Iterator

import yaml

from data_tools.units import shown
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.compare import difference, overrides
from jetmoe_megatron.plan.estimate import bytes_needed
from jetmoe_megatron.plan.plan import Plan
from jetmoe_megatron.plan.search import SHOWN, Found, Tried

_SHOWN_MISSES = 3


def search_text(run: Run, found: Found) -> Iterator[str]:
    best, own = found.best, found.own
    too_large = sum(one.plan is None for one in found.tried)
    yield (
        f"{len(found.tried)} layouts were looked at: {len(best)} fit with a margin, {len(found.tried) - len(best)} do "
        f"not; {too_large} of these have no room for the weights and the optimizer alone."
    )
    yield "Not searched: context parallelism, layers_per_stage, the batch of a step."
    if best:
        yield "The lines below a layout stand for those of the same keys in the run file."
    if own is not None and own.plan is not None:
        yield f"The run as it is: {_in_short(own.plan)}"
    elif own is not None:
        yield "The run as it is does not fit."
    for number, one in enumerate(best[:SHOWN], start=1):
        yield ""
        yield from _layout(number, one, run, own, best[0])
    if not best:
        yield "No layout that was looked at fits: take more GPUs, or such with more memory."
    yield from _misses(run, found)
    yield "All figures are computed from a rehearsal of the program. None is a measurement."


def _layout(number: int, one: Tried, run: Run, own: Tried | None, first: Tried) -> Iterator[str]:
    assert one.plan is not None and first.plan is not None
    yield f"{number}. {_in_short(one.plan)}"
    yield from (f"     {line}" for line in _yaml(one.plan.run))
    if own is not None and own.plan is not None:
        same = one.settings == own.settings
        yield "   The run as it is." if same else f"   Beside the run as it is, {difference(one.plan, own.plan)}."
    if one is not first:
        yield f"   Beside the first, {difference(one.plan, first.plan)}."


def _in_short(plan: Plan) -> str:
    estimate = plan.estimate
    return (
        f"{estimate.step_seconds:.3f} s a step, {estimate.tokens_per_second:,.0f} tokens per second, "
        f"{estimate.days:,.3g} days, ${estimate.dollars:,.0f}; the fullest GPU needs "
        f"{shown(bytes_needed(plan.hardware, plan.fullest), 'B')} of {plan.hardware.memory_gb:g} GB"
    )


def _yaml(run: Run) -> Iterator[str]:
    """All of a run file that the search changes."""
    sections = {
        "parallel": run.parallel.model_dump(mode="json", exclude_defaults=True),
        "batch": run.batch.model_dump(),
    }
    for key, values in sections.items():
        yield f"{key}: {yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=math.inf).rstrip()}"
    yield f"recompute: {run.recompute}"


def _misses(run: Run, found: Found) -> Iterator[str]:
    """Those that would be faster than the best, but do not fit with a margin."""
    limit = found.best[0].seconds if found.best else float("inf")
    misses = [one for one in found.tried if not one.fits and one.plan is not None and one.seconds < limit]
    if misses:
        yield ""
        yield "Faster, but without enough memory:"
    for one in misses[:_SHOWN_MISSES]:
        assert one.plan is not None
        yield f"   {overrides(one.plan.run, run) or 'the run as it is'}: {_in_short(one.plan)}"
