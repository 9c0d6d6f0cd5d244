"""Which charts a report has, and their numbers as `report.js` reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.printing import printable
from jetmoe_megatron.page.markup import tag, words
from jetmoe_megatron.report.colours import LOADS, PALETTE
from jetmoe_megatron.report.curves import Curves
from jetmoe_megatron.report.history import History
from jetmoe_megatron.report.routers import KINDS, Heatmap

_COLOURS = 10
_DASHES = {"none": "", "7 3": " (dashed)", "2 3": " (dotted)", "8 3 2 3": " (dash-dotted)", "16 4": " (long dashes)"}
SIGNS = {"checkpoint": "◆", "restart": "↻", "skipped step": "✕", "rollback": "↶", "alarm": "!"}
_KIND_OF_MARK = {"checkpoint": "quiet", "restart": "fair", "skipped step": "bad", "rollback": "bad", "alarm": "bad"}


@dataclass(frozen=True)
class Chart:
    """
    Attributes:
        keys: a key and its name. With * at its end: all keys that begin so; in the name, * is the rest of the key.
        log: drawn with a logarithmic axis at first.
        wide: the main chart, with checkpoints, restarts and what went wrong.
    """

    title: str
    keys: dict[str, str]
    log: bool = False
    wide: bool = False


def _of_kinds(name: str) -> dict[str, str]:
    return {f"{kind}_{name}": what for kind, what in KINDS.items()}


LOSSES = [
    Chart(
        "Loss, nats per token",
        {"lm_loss": "training", "held_out_loss": "held-out, mean", "held_out_loss/*": "held-out, *"},
        log=True,
        wide=True,
    ),
    Chart("Learning rate", {"lr": "learning rate"}),
    Chart("Gradient norm, before clipping", {"grad_norm": "whole model", "grad_norm/*": "*"}, log=True),
    Chart("Norm of all weights", {"param_norm": "weights"}),
    Chart("Norm of what a step changed in the weights", {"update_norm": "update"}, log=True),
    Chart("Held-out loss, bits per byte", {"bits_per_byte/*": "*"}),
]
ROUTER_LOSSES = [
    Chart("Balance loss, mean over layers (1: even)", _of_kinds("balance_loss")),
    Chart("z-loss, mean over layers", _of_kinds("z_loss")),
    Chart("Load of the busiest expert, mean over layers (1: even)", _of_kinds("load_imbalance")),
]
ROUTER_RECORDS = [
    Chart("Entropy of the gate (1: undecided, 0: sure)", _of_kinds("gate_entropy")),
    Chart("Margin of the first choice over the second", _of_kinds("top1_margin")),
    Chart("Entropy of the load (1: even)", _of_kinds("load_entropy")),
    Chart("Busiest expert's load (1: even)", _of_kinds("max_load")),
    Chart("Idlest expert's load (1: even, 0: dead)", _of_kinds("min_load")),
    Chart("Coefficient of variation of the load (0: even)", _of_kinds("load_variation")),
    Chart("Balance loss of each record", _of_kinds("balance_loss")),
    Chart("z-loss of each record", _of_kinds("z_loss")),
]
SPEED = [
    Chart("Tokens per second, all ranks", {"tokens_per_second": "tokens/s"}),
    Chart("TFLOP/s per rank", {"tflops_per_rank": "TFLOP/s"}),
    Chart("MFU", {"mfu": "MFU"}),
    Chart(
        "Seconds of a step",
        {
            "step_seconds": "step",
            "forward_backward_seconds": "of it, forward and backward",
            "gradient_reduction_seconds": "of it, reduction of gradients",
            "optimizer_seconds": "of it, optimizer",
            "data_wait_seconds": "of it, waiting for data",
        },
    ),
    Chart("Time of the slowest rank over the median", {"slowest_rank_ratio": "ratio"}),
    Chart("Goodput since the first start", {"goodput": "goodput"}),
    Chart("Rank-hours since the first start", {"rank_hours": "rank-hours"}),
    Chart("Dollars since the first start", {"dollars": "dollars"}),
]
MEMORY = [
    Chart("Memory of the GPU, GB", {"peak_memory_gb": "most so far, rank 0", "device_memory_gb": "fullest rank"}),
    Chart("Memory of the host, GB", {"host_memory_gb": "fullest rank"}),
    Chart(
        "Growth of memory, GB in 1,000 steps",
        {"device_memory_gb_per_1000_steps": "GPU", "host_memory_gb_per_1000_steps": "host"},
    ),
]


class Drawings:
    """Collects the numbers of all drawings of a page. Its methods return the elements that they go into."""

    def __init__(self, runs: Sequence[History]) -> None:
        self._axes: list[dict[str, Any]] = []
        self._charts: list[dict[str, Any]] = []
        self._heatmaps: list[dict[str, Any]] = []
        self._axis_of: dict[int, int] = {}
        for run in runs:
            self._axis(run.curves)

    def json(self) -> str:
        """Safe within a script element."""
        whole: dict[str, Any] = {"axes": self._axes, "charts": self._charts, "heatmaps": self._heatmaps}
        whole |= {"palette": PALETTE, "loads": LOADS, "dashes": [*_DASHES]}
        text = json.dumps(whole, allow_nan=False, separators=(",", ":"))
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

    def curves(self, chart: Chart, runs: Sequence[tuple[History, Curves]]) -> list[str]:
        """The chart, if any run has a value for it. Several runs have a colour each."""
        drawn: list[dict[str, Any]] = []
        several = len(runs) > 1
        for number, (run, curves) in enumerate(runs):
            for place, (key, name) in enumerate(_found(chart.keys, curves)):
                colour, dash = (number, place % len(_DASHES)) if several else (place, 0)
                label = f"{run.name}, {name}{[*_DASHES.values()][dash]}" if several else name
                named = {"key": key, "label": printable(label), "colour": f"c{colour % _COLOURS}", "dash": dash}
                drawn.append({**named, "axis": self._axis(curves), **curves.dump(key)})
        if not any(value is not None for curve in drawn for value in curve["mean"]):
            return []
        of: dict[str, Any] = {"log": chart.log, "stack": False, "wide": chart.wide}
        of["phases"] = _phases(runs[0][0]) if len(runs) == 1 else []
        of["marks"] = _marks([run for run, _ in runs]) if chart.wide else []
        return [self._chart(chart.title, {**of, "curves": drawn})]

    def stack(self, title: str, run: History, stacked: dict[str, Any]) -> list[str]:
        axis = self._axis(run.curves)
        drawn = [
            {"key": name, "label": printable(name), "colour": f"c{i % _COLOURS}", "dash": 0, "axis": axis, **curve}
            for i, (name, curve) in enumerate(stacked.items())
        ]
        of = {"log": False, "stack": True, "wide": True, "phases": [], "marks": []}
        return [self._chart(title, {**of, "curves": drawn})] if drawn else []

    def heatmap(self, title: str, heatmap: Heatmap) -> str:
        layers, experts = heatmap.shape
        one = {"tokens": heatmap.tokens, "layers": layers, "experts": experts, "codes": heatmap.codes()}
        self._heatmaps.append(one)
        box = tag("div", kind="plot heat", data_heatmap=str(len(self._heatmaps) - 1))
        return tag("figure", tag("figcaption", tag("b", words(title))), box)

    def _axis(self, curves: Curves) -> int:
        if id(curves) not in self._axis_of:
            self._axis_of[id(curves)] = len(self._axes)
            self._axes.append({"begin": curves.begin, "steps": curves.steps, "tokens": curves.tokens})
        return self._axis_of[id(curves)]

    def _chart(self, title: str, chart: dict[str, Any]) -> str:
        number, stack = str(len(self._charts)), chart["stack"]
        self._charts.append(chart)
        button = tag("button", "log", type="button", data_log=number, aria_pressed=str(chart["log"]).lower())
        head = tag("figcaption", tag("b", words(title)), "" if stack else button)
        plot = tag("div", kind="plot", data_chart=number)
        return tag("figure", head, _legend(chart["curves"], stack), plot, kind="wide" if chart["wide"] else "")


def _found(keys: dict[str, str], curves: Curves) -> Iterator[tuple[str, str]]:
    for wanted, name in keys.items():
        if not wanted.endswith("*"):
            if wanted in curves.of:
                yield wanted, name
            continue
        begin = wanted[:-1]
        for key in sorted(key for key in curves.of if key.startswith(begin) and len(key) >= len(begin)):
            yield key, name.replace("*", key.removeprefix(begin))


def _legend(curves: list[dict[str, Any]], stack: bool) -> str:
    """With the last value of each curve, or its share of the whole, also without JavaScript."""
    items = []
    for curve in curves:
        last = next((value for value in reversed(curve["mean"]) if value is not None), None)
        value = f"{curve['share']:.1%}" if stack else "" if last is None else _short(last)
        items.append(tag("span", tag("i", kind=curve["colour"]), words(curve["label"]), tag("b", words(value))))
    return tag("div", *items, kind="legend")


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"


def _phases(run: History) -> list[dict[str, Any]]:
    begins = [phase.tokens for phase in run.phases]
    ends = [*begins[1:], run.summary.last["tokens"]]
    return [
        {"name": printable(phase.phase), "from": begin, "to": end}
        for phase, begin, end in zip(run.phases, begins, ends, strict=True)
    ]


def _marks(runs: Sequence[History]) -> list[dict[str, Any]]:
    return [
        {
            "kind": _KIND_OF_MARK[kind],
            "sign": SIGNS[kind],
            "at": tokens,
            "text": printable(f"{run.name}: {text}" if len(runs) > 1 else text)[:200],
        }
        for run in runs
        for kind, marks in run.marks.items()
        for tokens, text in marks.kept
    ]
