"""A plan as text, with every assumption beside what follows from it."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.text_table import table
from jetmoe_megatron.plan import tables
from jetmoe_megatron.plan.plan import Plan
from jetmoe_megatron.plan.tables import Table


def text(plan: Plan) -> str:
    found = (tables.memory(plan), tables.work(plan), tables.sent(plan), tables.time(plan))
    return "\n".join([*tables.head(plan), "", *(line for one in found for line in _lines(one))])


def _lines(one: Table) -> Iterator[str]:
    yield one.title
    yield from table(one.columns, one.rows)
    if one.notes:
        yield from (f"  {note}" for note in one.notes)
        yield ""
