"""What differs between plans, and why one is faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_tools.text_table import table
from data_tools.units import shown
from jetmoe_megatron.config.describe import describe_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.estimate import bytes_needed
from jetmoe_megatron.plan.plan import Plan


def comparison(plans: Mapping[str, Plan | str]) -> Iterator[str]:
    """A table with a column for each plan, by its name; a text in the place of a plan says why there is none."""
    real = {name: plan for name, plan in plans.items() if isinstance(plan, Plan)}
    columns = {name: _figures(plan) for name, plan in real.items()}
    titles = next(iter(columns.values()), {})
    yield from table(["", *columns], [[title, *(figures[title] for figures in columns.values())] for title in titles])
    for name, plan in plans.items():
        if isinstance(plan, str):
            yield f"{name}: {plan}"


def _figures(plan: Plan) -> dict[str, str]:
    estimate, stage = plan.estimate, plan.stage(plan.slowest)
    return {
        "GPUs": f"{plan.layout.world:,}",
        "layout": describe_layout(plan.layout),
        "memory": plan.verdict,
        "needed on the fullest GPU": shown(bytes_needed(plan.hardware, plan.fullest), "B"),
        "a step": f"{estimate.step_seconds:.3f} s",
        "  computing": f"{sum(stage.compute.values()):.3f} s",
        "  sending, not hidden": f"{sum(stage.transfers.values()):.3f} s",
        "  the host waits": f"{stage.host_waits:.3f} s",
        "  pipeline's bubble": f"{estimate.bubble * estimate.step_seconds:.3f} s",
        "tokens per second": f"{estimate.tokens_per_second:,.0f}",
        "tokens per day": f"{estimate.tokens_per_second * 86400 / 1e9:,.3g} billion",
        "MFU by 6N": f"{estimate.mfu:.1%}",
        "the whole run": f"{estimate.days:,.3g} days",
        "cost": f"${estimate.dollars:,.0f}",
    }


def difference(plan: Plan, other: Plan) -> str:
    """Why a step of the plan takes as long as it does, beside the other: `5% less: computing -0.11 s, ...`."""
    new, old = _parts(plan), _parts(other)
    share = plan.estimate.step_seconds / other.estimate.step_seconds - 1
    changes = sorted(((new[part] - old[part], part) for part in new), key=lambda change: -abs(change[0]))
    told = [f"{part} {seconds:+.3f} s" for seconds, part in changes if abs(seconds) >= 0.0005]
    much = f"{abs(share):.1%} {'less' if share < 0 else 'more'} time" if abs(share) >= 0.0005 else "as long"
    return f"{much}: {', '.join(told[:3])}" if told else much


def _parts(plan: Plan) -> dict[str, float]:
    stage = plan.stage(plan.slowest)
    return {
        "computing": sum(stage.compute.values()),
        "sending": sum(stage.transfers.values()),
        "waits of the host": stage.host_waits,
        "bubble": plan.estimate.bubble * plan.estimate.step_seconds,
    }


def overrides(run: Run, of: Run) -> str:
    """What a command line must say of one run to get the other."""
    new, old = (dict(_leaves(one.model_dump(mode="json"))) for one in (run, of))
    changed = {key: value for key, value in new.items() if value != old[key]}
    return " ".join(f"{key}={'null' if value is None else value}" for key, value in changed.items())


def settings_that_differ(runs: Sequence[tuple[str, Run]]) -> Iterator[str]:
    """A table of all settings that are not the same in all runs, with a column for each run."""
    trees = [dict(_leaves(run.model_dump(mode="json"))) for _, run in runs]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    rows = [
        [key, *(str(tree.get(key, "")) for tree in trees)] for key in keys if len({str(t.get(key)) for t in trees}) > 1
    ]
    yield from table(["setting", *(name for name, _ in runs)], rows)


def _leaves(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{where}.{key}".lstrip("."))
    elif isinstance(node, list) and any(isinstance(entry, dict) for entry in node):
        for number, entry in enumerate(node):
            yield from _leaves(entry, f"{where}.{number}")
    else:
        yield where, node
