"""A plan as a page of its own for a browser."""

from __future__ import annotations

from jetmoe_megatron.config.hardware import Assumed, Hardware
from jetmoe_megatron.page.markup import cards, page_of, table, tag, words
from jetmoe_megatron.plan import tables
from jetmoe_megatron.plan.drawings import memory_bars, schedule
from jetmoe_megatron.plan.plan import Plan
from jetmoe_megatron.plan.tables import NO_MEASUREMENT, Table

_NUMBERS = {"FLOPs", "kernels", "time", "number", "bytes", "time alone", "estimate", "value"}
_LONG = {"from", "meaning"}


def page(plan: Plan) -> str:
    run, hardware = plan.run, plan.hardware
    first, *lines = tables.head(plan)
    memory = tables.memory(plan)
    title = f"Plan: {run.name} on {plan.layout.world} {hardware.gpu}"
    return page_of(
        title,
        tag("h1", words(title)),
        *(tag("p", words(line), kind="dim") for line in (first, *lines) if line != NO_MEASUREMENT),
        tag("p", tag("b", words(NO_MEASUREMENT)), kind="warning"),
        _figures(plan),
        tag("h2", words("Memory of each kind of rank")),
        tag("p", words(memory.title)),
        memory_bars(plan),
        *_notes(memory),
        tag("h2", words("One step of the pipeline")),
        schedule(plan),
        tag("h2", words("Time and cost")),
        *_table(tables.time(plan)),
        tag("h2", words("Work")),
        *_table(tables.work(plan)),
        tag("h2", words("Communication")),
        *_table(tables.sent(plan)),
        tag("h2", words("What the figures rest on")),
        *_table(_rates(hardware)),
        *_table(_assumed(hardware.assumed)),
    )


def _figures(plan: Plan) -> str:
    estimate = plan.estimate
    figures = [
        (plan.verdict, tables.left(plan)),
        (f"{estimate.step_seconds:.2f} s", "a step"),
        (f"{estimate.tokens_per_second:,.0f}", "tokens per second"),
        (f"{estimate.mfu:.1%}", "MFU by 6N"),
        (f"{estimate.days:,.1f} days", "the whole run"),
        (f"${estimate.dollars:,.0f}", f"at ${plan.hardware.dollars_per_gpu_hour:g} per GPU-hour"),
    ]
    return cards(figures, {plan.verdict: plan.verdict.replace(" ", "-")})


def _table(one: Table) -> list[str]:
    kinds = ["number" if name in _NUMBERS else "long" if name in _LONG else "" for name in one.columns]
    return [tag("p", words(one.title)), table(one.columns, one.rows, kinds), *_notes(one)]


def _notes(one: Table) -> list[str]:
    return [tag("p", words(note), kind="note") for note in one.notes]


def _rates(hardware: Hardware) -> Table:
    own = {key: field for key, field in Hardware.model_fields.items() if key != "assumed"}
    rows = [[key, str(getattr(hardware, key)), field.description or ""] for key, field in own.items()]
    return Table("Of the hardware file:", ["key", "value", "meaning"], rows)


def _assumed(assumed: Assumed) -> Table:
    rows = [[key, str(getattr(assumed, key)), field.description or ""] for key, field in Assumed.model_fields.items()]
    return Table("Assumed, or measured where it says so:", ["key", "value", "meaning"], rows)
