"""Memory as stacked bars, and a step as a timeline of its stages."""

from __future__ import annotations

from collections.abc import Sequence

from data_tools.units import shown
from jetmoe_megatron.config.hardware import Hardware
from jetmoe_megatron.page.markup import tag, words
from jetmoe_megatron.plan.estimate import bytes_needed
from jetmoe_megatron.plan.plan import Plan
from jetmoe_megatron.plan.rehearsal import Rehearsal
from jetmoe_megatron.plan.tables import name
from jetmoe_megatron.plan.timeline import Span

LOST, RESERVED = "lost between tensors (assumed)", "CUDA, NCCL, workspaces (assumed)"
# Directions of spans, and the recomputation within a backward pass.
_COLOURS = {"forward": "c0", "recompute": "c2", "backward": "c1", "gather": "c6", "reduction": "c4", "update": "c9"}
_MEANINGS = {
    "forward": "forward",
    "recompute": "recomputation",
    "backward": "backward",
    "gather": "weights gathered, not hidden",
    "reduction": "gradients reduced, not hidden",
    "update": "the rest of the step: gradient norm, optimizer",
}
_WIDTH, _LANE, _BAR, _AXIS, _GAP = 1060, 30, 26, 24, 150  # pixels
_AT_EACH_END = 16  # spans of a stage
_MOST_SPANS = 2400  # of a drawing
_LEGIBLE = 15  # pixels of a span, for the number of its micro-batch


def memory_parts(hardware: Hardware, rehearsal: Rehearsal) -> dict[str, float]:
    """In bytes, by kind: they add up to `bytes_needed`."""
    most = rehearsal.memory.most
    lost = sum(most.values()) * hardware.assumed.fragmentation
    return {**most, LOST: lost, RESERVED: hardware.assumed.reserved_gb * 1e9}


def memory_bars(plan: Plan) -> str:
    card = plan.hardware.memory_gb * 1e9
    found = [(one, memory_parts(plan.hardware, one)) for one in plan.world]
    whole = max(card, *(sum(parts.values()) for _, parts in found))
    kinds = list(dict.fromkeys(kind for _, parts in found for kind in parts if kind not in (LOST, RESERVED)))
    colours = {kind: f"c{number % 8}" for number, kind in enumerate(kinds)} | {LOST: "c8", RESERVED: "c9"}
    bars = []
    for one, parts in found:
        needed = bytes_needed(plan.hardware, one)
        segments = [
            tag(
                "i", kind=colours[kind], style=f"width:{100 * parts[kind] / whole:.3f}%", title=_held(kind, parts[kind])
            )
            for kind in colours
            if kind in parts
        ]
        limit = tag("span", kind="limit", style=f"left:{100 * card / whole:.3f}%") if whole > card else ""
        label = f"rank {name(one, plan.world)}, stage {one.place['pipeline']}"
        figure = f"{shown(needed, 'B')} of {plan.hardware.memory_gb:g} GB"
        bars.append(
            tag(
                "div",
                tag("p", tag("span", words(label)), tag("span", words(figure))),
                tag("div", tag("div", *segments, kind="parts"), limit, kind="track"),
                kind="bar",
            )
        )
    line = tag("figcaption", words("The line is where a GPU's memory ends.")) if whole > card else ""
    return tag("figure", _legend({kind: (colours[kind], kind) for kind in colours}), *bars, line)


def _held(kind: str, size: float) -> str:
    return f"{kind}: {shown(size, 'B')}"


def _legend(entries: dict[str, tuple[str, str]]) -> str:
    """entries: colour and meaning."""
    return tag(
        "div",
        *(tag("span", tag("i", kind=colour), words(meaning)) for colour, meaning in entries.values()),
        kind="legend",
    )


def schedule(plan: Plan) -> str:
    """A lane for each stage; of a long step its beginning and its end."""
    lanes = plan.estimate.timeline
    windows = _windows(lanes)
    seconds = sum(end - start for start, end in windows)
    scale = (_WIDTH - _GAP * (len(windows) - 1)) / seconds  # pixels per second
    height = _AXIS + _LANE * len(lanes)
    drawn, left = [], 0.0
    for start, end in windows:
        drawn += _window(plan, start, end, left, scale)
        left += (end - start) * scale + _GAP
    note = "What is neither coloured nor left out is idle."
    if len(windows) > 1:
        (_, until), (since, _) = windows
        out = [
            (span.direction, span.chunk, span.micro_batch)
            for span in lanes[0]
            if span.start >= until and span.end <= since
        ]
        middle = (until * scale) + _GAP / 2
        for line, text in enumerate((f"{since - until:.2f} s left out,", f"{len(out)} passes of", "the first stage")):
            at = {"x": f"{middle:.1f}", "y": _AXIS + height / 2 - 22 + 14 * line, "text_anchor": "middle"}
            drawn.append(tag("text", words(text), kind="left-out", **at))
        note += f" From {until:.2f} s to {since:.2f} s the passes go on in the same way and are not drawn."
    used = {span.direction for own in lanes for span in own if span.end > span.start}
    if any(seconds for stage in plan.estimate.stages for seconds in stage.seconds.recompute):
        used.add("recompute")
    labels = tag("ul", *(tag("li", words(f"stage {number}")) for number in range(len(lanes))))
    svg = tag("svg", *drawn, width=_WIDTH, height=height, viewBox=f"0 0 {_WIDTH} {height}", role="img")
    legend = _legend({key: (colour, _MEANINGS[key]) for key, colour in _COLOURS.items() if key in used})
    numbers = "Numbers are micro-batches."
    if plan.layout.virtual_pipeline > 1:
        numbers += " Every second chunk of a stage is fainter."
    return tag(
        "figure",
        legend,
        tag("div", labels, tag("div", svg, kind="scroll"), kind="lanes"),
        tag("figcaption", words(f"{numbers} {note}")),
    )


def _windows(lanes: Sequence[Sequence[Span]]) -> list[tuple[float, float]]:
    """What of a step is drawn: seconds from and to."""
    last = max(own[-1].end for own in lanes)
    if max(len(own) for own in lanes) <= 2 * _AT_EACH_END + 6:
        return [(0.0, last)]
    until = max(own[min(_AT_EACH_END // (1 + (own is not lanes[0])), len(own) - 1)].end for own in lanes)
    since = min(own[-min(_AT_EACH_END // 2, len(own))].start for own in lanes)
    while until < since and sum(s.start < until or s.end > since for own in lanes for s in own) > _MOST_SPANS:
        until, since = until * 0.9, last - (last - since) * 0.9
    return [(0.0, until), (since, last)] if until < since else [(0.0, last)]


def _window(plan: Plan, start: float, end: float, left: float, scale: float) -> list[str]:
    drawn = []
    ticks = max(1, round((end - start) * scale / 140))
    for number in range(ticks + 1):
        at = start + (end - start) * number / ticks
        x = left + (at - start) * scale
        anchor = "start" if number == 0 else "end" if number == ticks else "middle"
        bottom = _AXIS + _LANE * len(plan.estimate.timeline)
        drawn.append(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=16, y2=bottom, kind="tick"))
        drawn.append(tag("text", words(f"{at:.3f} s"), x=f"{x:.1f}", y=11, text_anchor=anchor, kind="axis"))
    for lane, own in enumerate(plan.estimate.timeline):
        top = _AXIS + _LANE * lane
        width = (end - start) * scale
        drawn.append(tag("rect", x=f"{left:.1f}", y=top, width=f"{width:.1f}", height=_BAR, kind="idle"))
        seen = (span for span in own if span.end > start and span.start < end and span.end > span.start)
        drawn += [_span(plan, lane, span, left - start * scale, scale, (start, end)) for span in seen]
    return drawn


def _span(plan: Plan, lane: int, span: Span, left: float, scale: float, window: tuple[float, float]) -> str:
    top = _AXIS + _LANE * lane

    def box(since: float, until: float, colour: str) -> str:
        since, until = max(since, window[0]), min(until, window[1])
        if until <= since:
            return ""
        kind = f"{colour} odd" if span.chunk % 2 else colour
        x, width = left + since * scale, (until - since) * scale
        return tag("rect", x=f"{x:.1f}", y=top, width=f"{max(width - 0.6, 0.4):.1f}", height=_BAR, kind=kind)

    is_pass = span.direction in ("forward", "backward")
    again = _recompute(plan, lane, span)
    drawn = [box(span.start, span.start + again, _COLOURS["recompute"])] if again else []
    drawn.append(box(span.start + again, span.end, _COLOURS[span.direction]))
    since, until = max(span.start + again, window[0]), min(span.end, window[1])
    if is_pass and (until - since) * scale >= _LEGIBLE:
        x = left + (since + until) / 2 * scale
        drawn.append(tag("text", words(span.micro_batch), x=f"{x:.1f}", y=top + 17, kind="on"))
    what = _MEANINGS[span.direction]
    if is_pass:
        chunk = f", chunk {span.chunk}" if plan.layout.virtual_pipeline > 1 else ""
        what = f"{span.direction}, micro-batch {span.micro_batch}{chunk}"
    return tag("g", tag("title", words(f"{what}: {span.start:.4f} to {span.end:.4f} s")), *drawn)


def _recompute(plan: Plan, lane: int, span: Span) -> float:
    """Seconds at the beginning of a backward pass."""
    if span.direction != "backward":
        return 0.0
    seconds = plan.estimate.of_stages[lane]
    return seconds.recompute[span.chunk]
