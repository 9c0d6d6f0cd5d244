"""Elements of a page, as text that is both HTML and XML. Nothing that a file says becomes markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from types import MappingProxyType

from data_tools.printing import printable

_WITHOUT_END = {"meta", "rect", "line"}


def words(text: object) -> str:
    return escape(printable(str(text)))


def tag(name: str, /, *inside: str, **attributes: object) -> str:
    """
    Args:
        inside: markup; text must have gone through `words`.
        attributes: `kind` stands for `class`, and _ for -.
    """
    named = {
        "class" if key == "kind" else key.replace("_", "-"): value for key, value in attributes.items() if value != ""
    }
    start = name + "".join(f' {key}="{words(value)}"' for key, value in named.items())
    return f"<{start}/>" if name in _WITHOUT_END else f"<{start}>{''.join(inside)}</{name}>"


def cards(figures: Iterable[tuple[str, str]], kinds: Mapping[str, str] = MappingProxyType({})) -> str:
    """A card for each value and what it is. kinds: the classes of values that have one."""
    shown = (
        tag("div", tag("b", words(value), kind=kinds.get(value, "")), tag("span", words(what)))
        for value, what in figures
    )
    return tag("div", *shown, kind="figures")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """kinds: the class of each column's cells: `number`, `long` or nothing."""
    kinds = kinds or [""] * len(columns)

    def row(element: str, cells: Sequence[str]) -> str:
        return tag("tr", *(tag(element, words(cell), kind=kind) for cell, kind in zip(cells, kinds, strict=True)))

    body = tag("tbody", *(row("td", cells) for cells in rows))
    return tag("div", tag("table", tag("thead", row("th", columns)), body), kind="scroll")


def page_of(title: str, *body: str, style: str = "") -> str:
    """A whole page: it loads nothing. style: rules besides those that all pages share."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", words(title)),
        tag("style", _STYLE + style),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", *body)), lang="en") + "\n"


# The classes c0 to c9 are colours that can be told apart on both grounds; what they stand for, the page says.
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2430; --dim: #5b6675; --line: #d8dde4; --card: #f5f7fa;
  --good: #1a7f45; --fair: #946200; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --ink: #e6eaf0; --dim: #9aa5b4; --line: #323a46;
  --card: #1a2029; --good: #5fd08c; --fair: #f0b849; --bad: #ff8a80 } }
* { box-sizing: border-box; -webkit-print-color-adjust: exact; print-color-adjust: exact }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 20px 16px 48px }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 36px 0 8px; border-top: 1px solid var(--line); padding-top: 18px }
p { margin: 4px 0 }
.dim, figcaption, .note { color: var(--dim); font-size: .88rem; overflow-wrap: anywhere }
.warning { border-left: 4px solid var(--fair); background: var(--card); padding: 8px 12px; margin: 14px 0 }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px; margin: 16px 0 }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px }
.figures b { display: block; font-size: 1.22rem; font-variant-numeric: tabular-nums }
.figures span { color: var(--dim); font-size: .82rem }
.fits { color: var(--good) } .tight { color: var(--fair) } .does-not-fit { color: var(--bad) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: 6px 0 }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.number, th.number { text-align: right; white-space: nowrap }
td.long { min-width: 190px }
figure { margin: 10px 0 }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .85rem; margin: 8px 0 }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px }
.bar { margin: 10px 0 }
.bar p { display: flex; justify-content: space-between; gap: 12px; font-size: .88rem; margin: 0 0 2px }
.track { position: relative; height: 26px; background: var(--card); border-radius: 4px; overflow: hidden }
.parts { display: flex; height: 100% }
.parts i { display: block; height: 100% }
.limit { position: absolute; top: 0; bottom: 0; width: 0; border-left: 2px solid var(--ink) }
.lanes { display: grid; grid-template-columns: auto 1fr; column-gap: 10px }
.lanes ul { list-style: none; margin: 0; padding: 24px 0 0; font-size: .85rem }
.lanes li { height: 30px; line-height: 26px; white-space: nowrap }
svg { display: block; font: 10px system-ui, sans-serif }
svg .idle { fill: var(--card) } svg .tick { stroke: var(--line) } svg .axis { fill: var(--dim) }
svg .left-out { fill: var(--dim); font-size: 11px }
svg .on { fill: #fff; text-anchor: middle; pointer-events: none } svg .odd { fill-opacity: .68 }
.c0 { --own: #3f66cf } .c1 { --own: #2f9a49 } .c2 { --own: #e0a100 } .c3 { --own: #ef6a55 } .c4 { --own: #9a5cf0 }
.c5 { --own: #38b0a3 } .c6 { --own: #86aef3 } .c7 { --own: #d264a8 } .c8 { --own: #97704f } .c9 { --own: #8a929d }
.c0, .c1, .c2, .c3, .c4, .c5, .c6, .c7, .c8, .c9 { background: var(--own); fill: var(--own) }
@media print { main { max-width: none; padding: 0 } .lanes { zoom: .6 } figure, .bar, tr { break-inside: avoid }
  .scroll { overflow: visible } table { font-size: .75rem } }
"""
