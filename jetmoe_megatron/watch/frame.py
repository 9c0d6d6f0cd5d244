"""What a look at a run shows. Text from files is printable, and never markup."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from data_tools.printing import printable
from data_tools.units import duration
from jetmoe_megatron.launch.status import age, seconds_left, starts
from jetmoe_megatron.report.lines import number
from jetmoe_megatron.report.routers import KINDS, numbers
from jetmoe_megatron.report.table import spent_rows
from jetmoe_megatron.watch.drawing import cell, curve
from jetmoe_megatron.watch.watched import Watched

Rows = list[tuple[str, str]]
_WIDE, _NARROW = 120, 72  # columns from which three panels, or two, are beside each other
_CURVE_ROWS = 3
_PACE_OF = 100  # lines


def frame(watched: Watched, width: int) -> RenderableType:
    if not watched.recent:
        return Group(_head(watched, width), *_messages(watched))
    beside = 3 if width >= _WIDE else 2 if width >= _NARROW else 1
    training = _panel("training", _training(watched), *_curve(watched, width // beside - 4))
    panels: list[RenderableType] = [_panel("speed", _speed(watched)), _panel("time", _time(watched))]
    panels = [training, Group(*panels)] if beside == 2 else [training, *panels]
    routers = list(_routers(watched))
    # A low terminal cuts the end.
    rows = [*_messages(watched), *_rows_of(panels, beside), *_rows_of(routers, min(beside, 2))]
    return Group(_head(watched, width), *rows)


def _head(watched: Watched, width: int) -> Panel:
    plan, last = watched.plan, watched.summary.last
    name = plan.name if plan else watched.files.root.name
    parts: list[RenderableType] = [_text(watched.state)]
    if plan and last:
        share = min(last["step"] / max(plan.last_step, 1), 1.0)
        done = round(share * (width - 4))
        parts.append(Text("█" * done + "░" * (width - 4 - done), style="cyan", no_wrap=True))
        told = f"step {last['step']:,} of {plan.last_step:,} ({share:.1%}) | {last['tokens']:,} tokens"
        told += f" | phase {last.get('phase')}"
        parts.append(_text(f"{told} | {_left(watched)} | last step {age(watched.files.metrics)} ago"))
    return Panel(Group(*parts), title=_text(f"{name}: {watched.files.root}"), title_align="left")


def _left(watched: Watched) -> str:
    try:
        assert watched.plan is not None
        return f"{duration(seconds_left(watched.plan, list(watched.recent)[-_PACE_OF:]))} left"
    except (KeyError, TypeError, ValueError, OverflowError):  # not the metrics of a run
        return "time left unknown"


def _training(watched: Watched) -> Rows:
    last, evaluated = watched.summary.last, watched.summary.evaluated
    rows = _numbers_of(watched, ("loss", "lm_loss", "{:.4f}"), ("learning rate", "lr", "{:.3g}"))
    rows += _numbers_of(watched, ("gradient norm", "grad_norm", "{:.3g}"))
    for name, key in (("balance", "balance_loss"), ("load", "load_imbalance")):
        pair = [number(last, f"{kind}_{key}") for kind in KINDS]
        rows += [(name, "/".join("-" if value is None else f"{value:.3f}" for value in pair))]
    for key in evaluated:
        if key.startswith("held_out_loss") and (value := number(evaluated, key)) is not None:
            rows.append((key.replace("held_out_loss/", "  on ").replace("held_out_loss", "held-out"), f"{value:.4f}"))
    if evaluated:
        rows.append(("  measured", f"step {evaluated['step']:,}"))
    return rows


def _speed(watched: Watched) -> Rows:
    last = watched.summary.last
    rows = _numbers_of(
        watched,
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
        ("seconds a step", "step_seconds", "{:.3g}"),
        ("TFLOP/s a rank", "tflops_per_rank", "{:.3g}"),
        ("MFU", "mfu", "{:.1%}"),
        ("peak memory", "peak_memory_gb", "{:.1f} GB"),
        ("host memory", "host_memory_gb", "{:.2f} GB"),
    )
    step, wait = number(last, "step_seconds"), number(last, "data_wait_seconds")
    if step and wait is not None:
        rows.append(("data wait", f"{wait / step:.1%}"))
    rank, ratio = number(last, "slowest_rank"), number(last, "slowest_rank_ratio")
    if rank is not None and ratio is not None:
        rows.append(("slowest rank", f"{rank:.0f}, {ratio:.2f} times the median"))
    return rows


def _time(watched: Watched) -> Rows:
    rows = spent_rows(watched.summary)
    rows += _numbers_of(watched, ("rank-hours", "rank_hours", "{:,.4g}"), ("dollars", "dollars", "{:,.2f}"))
    return rows


def _numbers_of(watched: Watched, *wanted: tuple[str, str, str]) -> Rows:
    """(name, key, form) of those that the last line has."""
    last = watched.summary.last
    return [(name, form.format(value)) for name, key, form in wanted if (value := number(last, key)) is not None]


def _curve(watched: Watched, columns: int) -> Iterator[Text]:
    losses = [number(line, "lm_loss") for line in watched.recent]
    values = [value for value in losses if value is not None]
    yield Text(f"loss of the last {len(values):,} steps", style="dim")
    yield from (Text(line, style="cyan", no_wrap=True) for line in curve(values, max(columns, 1), _CURVE_ROWS))


def _messages(watched: Watched) -> Iterator[RenderableType]:
    rows: Rows = []
    if (newest := watched.checkpoint) is not None:
        with contextlib.suppress(FileNotFoundError):  # the run has just removed it
            rows.append(("checkpoint", f"{newest.name}, {age(newest)} ago"))
    rows += starts(watched.history)
    rows += [("bad step", f"step {line['step']:,}: {line.get('reason')}") for line in watched.bad_steps]
    rows += [("alarm", line) for line in watched.alarms]
    rows += [("warning", line) for line in watched.warnings]
    if rows:
        yield _panel("events", rows)


def _routers(watched: Watched) -> Iterator[Panel]:
    """Letters: L layers, E experts."""
    for kind, name in KINDS.items():
        line = watched.routers or {}
        load_LE = numbers(line.get(f"{kind}_load"), 2)
        entropy_L = numbers(line.get(f"{kind}_gate_entropy"), 1)
        if load_LE is None:
            continue
        table = Table.grid(padding=(0, 1))
        table.add_column(justify="right", style="dim", no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_row("layer", Text("load of each expert", style="dim"), *(Text(t, style="dim") for t in ("most", "H")))
        for layer, load_E in enumerate(load_LE.tolist()):
            entropy = f"{entropy_L[layer]:.2f}" if entropy_L is not None and layer < len(entropy_L) else "-"
            table.add_row(f"{layer}", Text.assemble(*map(cell, load_E)), f"{max(load_E):.2f}", entropy)
        yield Panel(table, title=_text(f"routers of {name}, step {line['step']:,}"), title_align="left")


def _panel(title: str, rows: Rows, *more: RenderableType) -> Panel:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(style="dim", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for name, value in rows:
        table.add_row(_text(name), _text(value))
    return Panel(Group(table, *more), title=_text(title), title_align="left")


def _rows_of(panels: Sequence[RenderableType], beside: int) -> Iterator[Table]:
    for first in range(0, len(panels), beside):
        table = Table.grid(expand=True)
        row = panels[first : first + beside]
        for _ in row:
            table.add_column(ratio=1)
        table.add_row(*row)
        yield table


def _text(text: str) -> Text:
    return Text(printable(text))
