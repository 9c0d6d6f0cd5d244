"""A report as one page for a browser. It loads nothing; without JavaScript its tables still say the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jetmoe_megatron.page.markup import cards, page_of, table, tag, words
from jetmoe_megatron.report import charts
from jetmoe_megatron.report.charts import SIGNS, Chart, Drawings
from jetmoe_megatron.report.colours import LOADS, style
from jetmoe_megatron.report.configs import asked_shares, differences
from jetmoe_megatron.report.history import History
from jetmoe_megatron.report.origin import origin
from jetmoe_megatron.report.routers import DEAD, KINDS, LEAST, MOST, Heatmap, codes_of
from jetmoe_megatron.report.stack import data_sets, time_by_part
from jetmoe_megatron.report.table import results

_CARDS = ("steps", "tokens", "last loss", "held-out loss", "goodput", "tokens/s", "wall time")
_MOST_CELLS = 1600  # of a table of loads
_SCALE = (*range(LEAST, MOST + 1, 42), DEAD)  # codes that the legend of a heatmap shows
_MOST_ROWS = 200  # of a table of events
_MOST_SLOW = 8  # ranks that were the slowest most often
_HERE = Path(__file__).parent


def page(runs: Sequence[History], left_out: Sequence[str] = ()) -> str:
    """left_out: why runs that were asked for are not on the page."""
    drawings = Drawings(runs)
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    title = f"Run: {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    body = [
        tag("h1", words(title)),
        *(tag("p", words(f"Left out: {line}"), kind="warning") for line in left_out),
        *_head(runs),
        tag(
            "p",
            words("Drag over a chart to zoom in, double-click to see all. A band is from the least to the most."),
            kind="dim",
        ),
        *_section("Losses", _charts(drawings, charts.LOSSES, runs) + _marks(runs)),
        *_section("Alarms and bad steps", [part for run in runs for part in _events(run)]),
        *_section("Routers", _charts(drawings, charts.ROUTER_LOSSES, runs) + _routers(drawings, runs)),
        *_section("Speed and time", _charts(drawings, charts.SPEED, runs) + _slowest(runs) + _time(drawings, runs)),
        *_section("Data", _mixtures(drawings, runs)),
        *_section("Memory", _charts(drawings, charts.MEMORY, runs)),
        *_section("Configuration", _configs(runs)),
        *_section("Where it ran", [part for run in runs for part in _per_run(runs, run, list(origin(run.files)))]),
        tag("script", drawings.json(), type="application/json", id="data"),
        tag("script", (_HERE / "report.js").read_text(encoding="utf-8")),
    ]
    return page_of(title, *body, style=(_HERE / "report.css").read_text(encoding="utf-8"))


def _section(title: str, parts: list[str]) -> list[str]:
    return [tag("h2", words(title)), *parts] if parts else []


def _per_run(runs: Sequence[History], run: History, parts: list[str]) -> list[str]:
    """With the run's name above, if there are several."""
    return [tag("h3", words(run.name)), *parts] if parts and len(runs) > 1 else parts


def _head(runs: Sequence[History]) -> list[str]:
    if len(runs) == 1:
        rows = runs[0].summary.rows()
        values = {name: value.removesuffix(" (median)") for name, value in rows}
        values["tokens"] = _short(runs[0].summary.last["tokens"])
        whole = table(["", ""], [*rows, *results(runs[0].folder)], ["", "number"])
        return [
            tag("p", words(runs[0].folder), kind="dim"),
            cards((values[name], name) for name in _CARDS if name in values),
            tag("details", tag("summary", "All numbers"), whole),
        ]
    of_runs = [dict(run.summary.rows()) for run in runs]
    names = list(dict.fromkeys(name for values in of_runs for name in values))
    lines = [["folder", *(str(run.folder) for run in runs)]]
    lines += [[name.strip(), *(values.get(name, "") for values in of_runs)] for name in names]
    return [table(["", *(run.name for run in runs)], lines)]


def _short(tokens: int) -> str:
    """`1.26T`: the whole number is among all numbers."""
    size, unit = next((one for one in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if tokens >= one[0]), (1, ""))
    return f"{tokens / size:.4g}{unit}" if unit else f"{tokens:,}"


def _charts(drawings: Drawings, wanted: Sequence[Chart], runs: Sequence[History]) -> list[str]:
    return _grid(part for chart in wanted for part in drawings.curves(chart, [(run, run.curves) for run in runs]))


def _grid(figures: Iterable[str]) -> list[str]:
    """Beside one another where there is room."""
    found = list(figures)
    return [tag("div", *found, kind="charts")] if found else []


def _marks(runs: Sequence[History]) -> list[str]:
    counts = {kind: sum(run.marks[kind].total for run in runs) for kind in SIGNS}
    named = [f"{SIGNS[kind]} {kind} ({count:,})" for kind, count in counts.items() if count]
    there = "; checkpoints are those that are still there" if counts["checkpoint"] else ""
    return [tag("p", words(f"Marks: {', '.join(named)}{there}"), kind="note")] if named else []


def _events(run: History) -> Iterator[str]:
    for title, keys, lines in (
        ("Alarms", ("step", "alarm", "message"), run.alarms),
        ("Bad steps", ("step", "reason", "action", "lm_loss", "grad_norm"), run.bad_steps),
    ):
        if lines:
            last = f", the last {_MOST_ROWS}" if len(lines) > _MOST_ROWS else ""
            yield tag("p", words(f"{title} of {run.name} ({len(lines):,}{last}):"))
            yield table(keys, [[str(line.get(key, "")) for key in keys] for line in lines[-_MOST_ROWS:]])


def _routers(drawings: Drawings, runs: Sequence[History]) -> list[str]:
    recorded = [(run, run.routers.curves) for run in runs if run.routers]
    parts = [
        tag("p", words(f"{run.files.routers}: no records; logging.router_every_steps switches them on."), kind="note")
        for run in runs
        if not run.routers
    ]
    if recorded:
        said = "From routers.jsonl: the line is the mean over layers, the band is from the least layer to the most."
        parts.append(tag("p", words(said)))
        parts += _grid(part for chart in charts.ROUTER_RECORDS for part in drawings.curves(chart, recorded))
    for run in runs:
        if run.routers:
            heatmaps = run.routers.heatmaps.items()
            parts += _per_run(
                runs, run, [part for kind, one in heatmaps for part in _heatmap(drawings, KINDS[kind], one)]
            )
    return parts


def _heatmap(drawings: Drawings, kind: str, heatmap: Heatmap) -> Iterator[str]:
    yield drawings.heatmap(f"Load of the {kind} experts: a row for each expert of each layer", heatmap)
    yield tag("div", *(tag("span", tag("i", style=style(code)), words(LOADS[code])) for code in _SCALE), kind="legend")
    last_LE = heatmap.last_LE
    if last_LE.size > _MOST_CELLS:
        return
    layers, experts = last_LE.shape
    codes_LE = codes_of(last_LE, last_LE <= 0)
    head = tag("tr", tag("th", "layer"), *(tag("th", str(e), kind="number") for e in range(experts)))
    rows = [
        tag(
            "tr",
            tag("th", str(layer)),
            *(_cell(last_LE[layer, e], codes_LE[layer, e], layer, e) for e in range(experts)),
        )
        for layer in range(layers)
    ]
    whole = tag("table", tag("thead", head), tag("tbody", *rows), kind="loads")
    yield tag("details", tag("summary", words(f"{kind}, last record")), tag("div", whole, kind="scroll"))


def _cell(load: np.float64, code: np.uint8, layer: int, expert: int) -> str:
    return tag("td", f"{load:.2f}", style=style(int(code)), title=f"layer {layer}, expert {expert}: {load:.4g}")


def _time(drawings: Drawings, runs: Sequence[History]) -> list[str]:
    title = "Time by part, share of the wall time"
    return [part for run in runs for part in _per_run(runs, run, drawings.stack(title, run, time_by_part(run.curves)))]


def _slowest(runs: Sequence[History]) -> list[str]:
    return [part for run in runs for part in _per_run(runs, run, list(_slow_ranks(run)))]


def _slow_ranks(run: History) -> Iterator[str]:
    if total := run.slowest.total():
        rows = [[str(rank), f"{n:,}", f"{n / total:.1%}"] for rank, n in run.slowest.most_common(_MOST_SLOW)]
        last = f", {_MOST_SLOW} of {len(run.slowest)} ranks" if len(run.slowest) > _MOST_SLOW else ""
        yield tag("p", words(f"Steps in which a rank was the slowest{last}:"))
        yield table(["rank", "steps", "share"], rows, ["", "number", "number"])


def _mixtures(drawings: Drawings, runs: Sequence[History]) -> list[str]:
    return [part for run in runs for part in _per_run(runs, run, list(_mixture(drawings, run)))]


def _mixture(drawings: Drawings, run: History) -> Iterator[str]:
    asked, rows = asked_shares(run.config), []
    for phase in run.phases:
        total, wanted = sum(phase.read.values()), asked.get(phase.phase, {})
        for name in dict.fromkeys([*wanted, *phase.read]):
            tokens = phase.read.get(name, 0)
            share = f"{tokens / total:.2%}" if total else ""
            rows.append([phase.phase, name, f"{tokens:,}", share, f"{wanted[name]:.2%}" if name in wanted else ""])
    if not rows:
        return
    yield from drawings.stack("Data sets, share of what is read", run, data_sets(run.curves))
    columns = ["phase", "data set", "tokens read", "share read", "share asked"]
    yield table(columns, rows, ["", "", "number", "number", "number"])


def _configs(runs: Sequence[History]) -> list[str]:
    parts = []
    if len(runs) > 1:
        rows = differences([run.config for run in runs])
        parts.append(
            tag("p", words(f"Values of config.yaml that differ: {len(rows)}" if rows else "No value differs."))
        )
        parts += [table(["key", *(run.name for run in runs)], rows)] if rows else []
    for run in runs:
        name = f"config.yaml of {run.name}"
        text = tag("pre", "\n".join(map(words, run.config_text.split("\n"))))
        parts.append(tag("details", tag("summary", words(name)), text))
    return parts
