"""Folders of runs that never ran, and what a page says to a browser."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

TOKENS = 1000  # of a step


def metrics_line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "phase": "stable" if step <= 6 else "decay",
        "tokens": TOKENS * step,
        "lr": 1e-3 / step,
        "lm_loss": 5.0 + math.sin(step),
        "moa_balance_loss": 1.0 + 1 / step,
        "moe_balance_loss": 1.1,
        "grad_norm": 0.1 * step,
        "data_wait_seconds": 0.25,
        "tokens_per_second": 400.0 + step,
        "dataset_tokens/code": 750 * step,
        "dataset_tokens/prose": 250 * step,
        "other_seconds": 0.5,
        "step_seconds": 2.25,
        "goodput": 0.8,
        **more,
    }


def router_record(step: int, layers: int = 2, experts: int = 4, **more: Any) -> dict[str, Any]:
    even = [[1.0] * experts for _ in range(layers)]
    found: dict[str, Any] = {"step": step, "tokens": TOKENS * step, "steps": 2}
    for kind in ("moa", "moe"):
        found[f"{kind}_load"] = even
        for name in ("gate_entropy", "top1_margin", "balance_loss", "z_loss"):
            found[f"{kind}_{name}"] = [0.5 + 0.1 * layer for layer in range(layers)]
    return {**found, **more}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """What is in a page: texts without scripts and styles, elements, attributes, and the numbers of its drawings."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.cells: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.texts.append(data)
        if inside in ("td", "th"):
            self.cells.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])

    def curves(self, key: str) -> list[dict[str, Any]]:
        """Of all charts, in the page's order."""
        return [curve for chart in self.data["charts"] for curve in chart["curves"] if curve["key"] == key]
