"""The page's JavaScript in a real browser: it draws, says values, zooms, and makes no error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.report.history import History
from jetmoe_megatron.report.page import page
from tests.report.browser import CHROMIUM, Tab, new_tab
from tests.report.run_folders import TOKENS, metrics_line, router_record, write_lines

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

STEPS = 40
LEFT, RIGHT = 62, 12  # of a drawing, as in report.js
MAIN = "document.querySelector('[data-chart=\"0\"] svg')"
TIP = "document.querySelector('.tip')"


def folder_of(tmp_path: Path, name: str = "run", steps: int = STEPS) -> Path:
    folder = tmp_path / name
    lines = [metrics_line(step, held_out_loss=3.0, mfu=0.4 + step / 1000) for step in range(1, steps + 1)]
    lines[-1] |= {"lm_loss": float("nan"), "skipped": "loss is nan"}
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "routers.jsonl", [router_record(step) for step in range(2, steps + 1, 2)])
    (folder / "checkpoints/tokens_20000").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with new_tab(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab, tmp_path: Path) -> Tab:
    """With the page of one run."""
    return opened(browser, tmp_path, folder_of(tmp_path))


def opened(browser: Tab, tmp_path: Path, *folders: Path) -> Tab:
    file = tmp_path / "page.html"
    file.write_text(page([History(folder, len(folders)) for folder in folders]))
    browser.open(file, 1400, 6000)
    return browser


def spot(tab: Tab, tokens: float, svg: str = MAIN) -> tuple[float, float]:
    """The pixels of a drawing that shows the whole run, at so many tokens."""
    box: dict[str, float] = tab.value(f"{svg}.getBoundingClientRect().toJSON()")
    left, right = box["x"] + LEFT, box["x"] + box["width"] - RIGHT
    return left + (right - left) * tokens / (STEPS * TOKENS), box["y"] + box["height"] / 2


def ticks(tab: Tab) -> list[str]:
    """What the axis of tokens says under each chart: the same under all charts of a width."""
    texts = "[...box.querySelectorAll('text.axis[text-anchor=middle]')].map((one) => one.textContent).join(' ')"
    found: list[str] = tab.value(f"[...document.querySelectorAll('[data-chart]')].map((box) => {texts})")
    return sorted(set(found))


def test_everything_is_drawn(tab: Tab) -> None:
    drawn: list[dict[str, Any]] = tab.value("""
        [...document.querySelectorAll("[data-chart], [data-heatmap]")].map((box) => ({
            lines: [...box.querySelectorAll("path.curve, path.share")]
                .filter((one) => one.getTotalLength() > 50).length,
            marks: [...box.querySelectorAll("text.sign")].map((one) => one.textContent).join(""),
            canvas: [...box.querySelectorAll("canvas")].map((one) =>
                new Set(one.getContext("2d").getImageData(0, 0, one.width, one.height).data).size).join(""),
            asked: box.dataset.chart && JSON.parse(document.getElementById("data").textContent)
                .charts[box.dataset.chart].curves.length,
        }))""")
    charts = [one for one in drawn if "asked" in one]
    assert len(charts) >= 15 and all(chart["lines"] == chart["asked"] > 0 for chart in charts)
    assert set(charts[0]["marks"]) == {"✕", "◆"}
    heatmaps = [one for one in drawn if "asked" not in one]
    assert len(heatmaps) == 2 and all(int(heatmap["canvas"]) > 1 for heatmap in heatmaps)
    assert tab.errors == [] and len(tab.requests) == 1, "it loads nothing"


def test_values_are_read_off(tab: Tab) -> None:
    tab.mouse("Moved", *spot(tab, 7.1 * TOKENS))
    line = metrics_line(7)
    assert tab.value(f"[...{TIP}.children].map((one) => one.textContent)") == [
        "step 7, 7,000 tokens",
        f"training {line['lm_loss']:.5g}",
        "held-out, mean 3",
    ]
    assert tab.value(f"{TIP}.style.display") == "block"
    tab.mouse("Moved", *spot(tab, 20 * TOKENS))
    assert tab.value(f"{TIP}.lastChild.textContent") == "◆ checkpoint tokens_20000"
    tab.mouse("Moved", *spot(tab, 6.4 * TOKENS, "document.querySelector('[data-heatmap] svg')"))
    assert tab.value(f"{TIP}.lastChild.textContent") == "up to 8,000 tokens: load 1"
    tab.mouse("Moved", 1, 1)
    assert tab.value(f"{TIP}.style.display") == "none" and tab.errors == []


def test_zoom(tab: Tab) -> None:
    before = ticks(tab)
    tab.mouse("Pressed", *spot(tab, 9 * TOKENS), 1)
    tab.mouse("Moved", *spot(tab, 12 * TOKENS))
    tab.mouse("Released", *spot(tab, 13 * TOKENS), 1)
    shown = [[int(tick.replace(",", "")) for tick in ticks_.split()] for ticks_ in ticks(tab)]
    assert shown and all(len(own) > 1 and 8900 <= min(own) <= max(own) <= 13_100 for own in shown)
    tab.click(*spot(tab, 20 * TOKENS), clicks=2)
    assert ticks(tab) == before and tab.errors == []


def test_logarithmic_axis(tab: Tab) -> None:
    button = "document.querySelector('button[data-log=\"2\"]')"
    labels = "[...document.querySelectorAll('[data-chart=\"2\"] text.axis')].map((one) => one.textContent).join(' ')"
    box: dict[str, float] = tab.value(f"{button}.getBoundingClientRect().toJSON()")
    was, before = tab.value(f"{button}.ariaPressed"), tab.value(labels)
    tab.click(box["x"] + 5, box["y"] + 5)
    assert {was, tab.value(f"{button}.ariaPressed")} == {"true", "false"} and tab.value(labels) != before
    tab.click(box["x"] + 5, box["y"] + 5)
    assert tab.value(labels) == before and tab.errors == []


def test_a_narrow_window(tab: Tab) -> None:
    """Each drawing fits, and nothing must be scrolled sideways."""
    tab.resize(500, 900)
    tab.value("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    widths = "[...document.querySelectorAll('.plot svg')].map((one) => one.viewBox.baseVal.width)"
    assert max(tab.value(widths)) <= 500 and tab.value("document.documentElement.scrollWidth") <= 500
    assert tab.errors == []


@pytest.mark.parametrize("steps", [(1,), (STEPS, 3), (1, 1)])
def test_other_runs(steps: tuple[int, ...], browser: Tab, tmp_path: Path) -> None:
    folders = [folder_of(tmp_path, f"run{number}", own) for number, own in enumerate(steps)]
    tab = opened(browser, tmp_path, *folders)
    assert tab.value(f"{MAIN}.querySelectorAll('path.curve').length") == 2 * len(folders)
    tab.mouse("Moved", *spot(tab, STEPS * TOKENS / 2))
    assert "step" in tab.value(f"{TIP}.textContent") and tab.errors == []


def test_an_error_is_noticed(browser: Tab, tmp_path: Path) -> None:
    """What the other tests rely on."""
    file = tmp_path / "page.html"
    file.write_text(page([History(folder_of(tmp_path))]).replace("show(view);\n})", "show(views);\n})"))
    browser.open(file, 1400, 6000)
    assert len(browser.errors) == 1 and "views is not defined" in browser.errors[0]
