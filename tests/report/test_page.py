"""The page of a run, and of several: true, whole, inert, and it loads nothing."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data_tools.printing import printable
from jetmoe_megatron.report.history import History
from jetmoe_megatron.report.page import page
from tests.report.run_folders import TOKENS, Page, metrics_line, router_record, write_lines

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[2J"
CONFIG = """name: first
seed: 1
optimizer: {max_lr: 0.001}
phases:
- name: stable
  tokens: 6000
  learning_rate: constant
  data: [{name: code, path: a, weight: 3}, {name: prose, path: b, weight: 1}]
- {name: decay, tokens: 2000, learning_rate: exponential, data: [{name: prose, path: b, weight: 1}]}
"""


def folder_of(tmp_path: Path, name: str = "run", steps: int = 8, **more: Any) -> Path:
    folder = tmp_path / name
    write_lines(folder / "metrics.jsonl", [metrics_line(step, **more) for step in range(1, steps + 1)])
    return folder


def read(*folders: Path) -> Page:
    return Page(page([History(folder, len(folders)) for folder in folders]))


def test_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    lines = [metrics_line(step) for step in range(1, 9)]
    lines[3] |= {"held_out_loss": 4.0, "held_out_loss/code": 3.9, "lm_loss": math.nan, "mfu": 0.4}
    lines[7] |= {"held_out_loss": 3.5, "held_out_loss/code": 3.4, "peak_memory_gb": 61.5, "host_memory_gb": 1.5}
    write_lines(folder / "metrics.jsonl", lines)
    found = read(folder)
    (axis,) = found.data["axes"]
    assert axis == {"begin": [0, 0], "steps": [*range(1, 9)], "tokens": [TOKENS * step for step in range(1, 9)]}
    for key in ("lr", "moa_balance_loss", "moe_balance_loss", "grad_norm", "tokens_per_second", "goodput"):
        (curve,) = found.curves(key)
        assert curve["mean"] == [line[key] for line in lines] and "at" not in curve, key
    (loss,) = found.curves("lm_loss")
    assert loss["mean"] == [None if step == 3 else line["lm_loss"] for step, line in enumerate(lines)]
    for key, at in (("held_out_loss/code", [3, 7]), ("held_out_loss", [3, 7]), ("mfu", [3]), ("host_memory_gb", [7])):
        (curve,) = found.curves(key)
        assert (curve["at"], curve["mean"]) == (at, [lines[i][key] for i in at])
    assert [chart["curves"][0]["key"] for chart in found.data["charts"]][:3] == ["lm_loss", "lr", "grad_norm"]
    assert found.curves("peak_memory_gb") and not found.curves("moa_gate_entropy")


NEWER = {
    "param_norm": "Norm of all weights",
    "update_norm": "Norm of what a step changed in the weights",
    "grad_norm/moa": "Gradient norm, before clipping",
    "bits_per_byte/code": "Held-out loss, bits per byte",
    "forward_backward_seconds": "Seconds of a step",
    "gradient_reduction_seconds": "Seconds of a step",
    "optimizer_seconds": "Seconds of a step",
    "slowest_rank_ratio": "Time of the slowest rank over the median",
    "rank_hours": "Rank-hours since the first start",
    "dollars": "Dollars since the first start",
    "peak_memory_gb": "Memory of the GPU, GB",
    "device_memory_gb": "Memory of the GPU, GB",
    "host_memory_gb": "Memory of the host, GB",
    "host_memory_gb_per_1000_steps": "Growth of memory, GB in 1,000 steps",
    "device_memory_gb_per_1000_steps": "Growth of memory, GB in 1,000 steps",
}


@pytest.mark.parametrize("key", NEWER)
def test_a_key_that_some_runs_lack(key: str, tmp_path: Path) -> None:
    """In its chart, and without it there is no such chart."""
    without, found = read(folder_of(tmp_path, "without")), read(folder_of(tmp_path, "with", 8, **{key: 0.25}))
    (curve,) = found.curves(key)
    assert curve["mean"] == [0.25] * 8 and not without.curves(key)
    titles = without.texts.count(NEWER[key])
    assert found.texts.count(NEWER[key]) == 1
    assert titles == (NEWER[key] in ("Seconds of a step", "Gradient norm, before clipping"))


def test_which_rank_is_slow(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    slowest = [3, 3, 1, 3, None, 1.5, True, 3]
    write_lines(folder / "metrics.jsonl", [metrics_line(i, slowest_rank=rank) for i, rank in enumerate(slowest, 1)])
    found = read(folder)
    at = found.cells.index("rank")
    assert found.cells[at : at + 9] == ["rank", "steps", "share", "3", "4", "80.0%", "1", "1", "20.0%"]
    assert "Steps in which a rank was the slowest:" in found.text
    assert "was the slowest" not in read(folder_of(tmp_path, "other")).text
    write_lines(folder / "metrics.jsonl", [metrics_line(step, slowest_rank=step) for step in range(1, 10)])
    assert "Steps in which a rank was the slowest, 8 of 9 ranks:" in read(folder).text


def test_it_says_its_numbers_without_javascript(tmp_path: Path) -> None:
    text = read(folder_of(tmp_path, held_out_loss=2.125)).text
    for said in ("Run: run", f"{5 + math.sin(8):.4f}", "2.1250", "80.00%", "404", "8,000"):
        assert said in text


def test_it_loads_nothing_and_parses(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    write_lines(folder / "routers.jsonl", [router_record(step) for step in (2, 4)])
    found = read(folder)
    assert not {"src", "href", "srcset"} & {name for name, _ in found.attributes}
    assert not {"link", "img", "iframe", "object"} & {*found.elements}
    text = page([History(folder)])
    for word in ("@import", "fetch(", "XMLHttp", "WebSocket", "import(", "innerHTML", "eval("):
        assert word not in text
    assert text.count("url(") == 1 and "url(#${id})" in text  # a shape in the page
    assert text.count("http") == 1 and '"http://www.w3.org/2000/svg"' in text  # the name of the kind of elements


def test_names_from_files_stay_text(tmp_path: Path) -> None:
    names: dict[str, Any] = {f"dataset_tokens/{HOSTILE}": 1, f"grad_norm/{HOSTILE}": 1.0, "skipped": HOSTILE}
    names["alarms"] = {HOSTILE: HOSTILE}
    folder = folder_of(tmp_path, **names)
    write_lines(folder / "bad_steps.jsonl", [{"step": 2, "reason": HOSTILE, "action": "rollback"}])
    (folder / "config.yaml").write_text(f"name: {json.dumps(HOSTILE)}\n")
    write_lines(
        folder / "starts.jsonl",
        [{"event": "start", "time": HOSTILE, "start": HOSTILE, "tokens": 0, "nodes": [HOSTILE]}],
    )
    (folder / "checkpoints/tokens_2000").mkdir(parents=True)
    write_lines(folder / "doctor/now.json", [{"ranks": [{"runs_on": {HOSTILE: HOSTILE}}]}])
    found = read(folder)
    assert found.elements.count("script") == 2 and "img" not in found.elements
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert found.text.count("<script>alert(1)</script>") >= 10
    text = page([History(folder)])
    assert "\x1b" not in text and "\u202e" not in text and "\\u202e" in text
    labels = [curve["label"] for chart in found.data["charts"] for curve in chart["curves"]]
    assert any(label.startswith("</script>") for label in labels)
    assert [printable(label) for label in labels] == labels and "<" not in found.scripts[0]


def test_many_steps_keep_their_spikes_and_stay_small(tmp_path: Path) -> None:
    lines = [metrics_line(step, phase="long") for step in range(1, 5001)]
    lines[1234]["lm_loss"], lines[4321]["grad_norm"] = 1e4, -1.0
    write_lines(tmp_path / "metrics.jsonl", lines)
    found = read(tmp_path)
    (loss,), (norm,) = found.curves("lm_loss"), found.curves("grad_norm")
    assert max(loss["high"]) == 1e4 and min(norm["low"]) == -1.0
    assert 800 <= len(loss["mean"]) <= 1600
    ends = found.data["axes"][0]["steps"]
    for begin, end, low, high in zip([0, *ends], ends, loss["low"], loss["high"], strict=False):
        own = [line["lm_loss"] for line in lines[begin:end]]
        assert (low, high) == pytest.approx((min(own), max(own)), rel=1e-5)
    assert len(page([History(tmp_path)])) < 1_000_000


def test_marks_and_phases(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    lines = [metrics_line(step) for step in range(1, 9)]
    lines[0]["start_seconds"] = lines[4]["start_seconds"] = 60.0
    lines[2]["skipped"] = "a spike"
    lines[6]["alarms"] = {"collapse": "layer 5"}
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "bad_steps.jsonl", [{"step": 6, "reason": "loss is nan", "action": "rollback"}])
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/rollbacks.json").write_text(json.dumps({"2000": {}, "x": {}}))
    for name in ("tokens_2000", "tokens_4000.damaged", "tokens_8000"):
        (folder / "checkpoints" / name).mkdir()
    found = read(folder)
    chart = found.data["charts"][0]
    marks = sorted((mark["at"], mark["sign"], mark["text"]) for mark in chart["marks"])
    assert [(at, text) for at, _, text in marks] == [
        (2000, "rolled back to 2,000 tokens"),
        (2000, "checkpoint tokens_2000"),
        (3000, "step 3: skipped: a spike"),
        (5000, "step 5: first after a start or a rollback"),
        (6000, "step 6: loss is nan: rolled back"),
        (7000, "step 7: collapse: layer 5"),
        (8000, "checkpoint tokens_8000"),
    ]
    phases = [{"name": "stable", "from": 0, "to": 6000}, {"name": "decay", "from": 6000, "to": 8000}]
    assert chart["phases"] == phases == found.data["charts"][1]["phases"] and not found.data["charts"][1]["marks"]
    assert {"collapse", "layer 5", "loss is nan", "rollback"} <= {*found.cells}


def test_time_and_data(tmp_path: Path) -> None:
    """As shares: of the time, 2.0 s of steps, 0.25 s of waiting, 0.5 s of other things, once 5.5 s of evaluation."""
    folder = folder_of(tmp_path, phase="stable")
    with open(folder / "metrics.jsonl", "a") as file:
        last = metrics_line(9, evaluation_seconds=5.5, **{"dataset_tokens/code": 6000, "dataset_tokens/prose": 3000})
        file.write(json.dumps(last) + "\n")
    (folder / "config.yaml").write_text(CONFIG)
    found = read(folder)
    time, data = [chart["curves"] for chart in found.data["charts"] if chart["stack"]]
    assert [curve["key"] for curve in time] == ["steps", "waits for data", "other", "evaluation"]
    assert [curve["mean"][0] for curve in time] == pytest.approx([2 / 2.75, 0.25 / 2.75, 0.5 / 2.75, 0], abs=1e-5)
    assert time[3]["mean"][8] == pytest.approx(5.5 / 8.25, abs=1e-5) and time[3]["share"] == pytest.approx(5.5 / 30.25)
    for below, above in pairwise(time):
        assert below["high"] == above["low"]
    assert time[-1]["high"] == pytest.approx([1.0] * 9)
    assert [curve["mean"] for curve in data] == [[0.75] * 8 + [0.0], [0.25] * 8 + [1.0]]
    row = found.cells.index("code")
    assert found.cells[row - 1 : row + 4] == ["stable", "code", "6,000", "75.00%", "75.00%"]
    row = found.cells.index("decay")
    assert found.cells[row : row + 5] == ["decay", "prose", "1,000", "100.00%", "100.00%"]


def test_a_run_that_continues_another(tmp_path: Path) -> None:
    """What the other has read is not counted as read here."""
    write_lines(tmp_path / "metrics.jsonl", [metrics_line(step, phase="late") for step in range(101, 105)])
    found = read(tmp_path)
    assert found.data["axes"][0]["begin"] == [100, 100 * TOKENS]
    row = found.cells.index("late")
    assert found.cells[row : row + 4] == ["late", "code", "2,250", "75.00%"]
    (data,) = [chart["curves"] for chart in found.data["charts"] if chart["stack"] and len(chart["curves"]) == 2]
    assert [curve["mean"] for curve in data] == [[None, 0.75, 0.75, 0.75], [None, 0.25, 0.25, 0.25]]


def test_routers(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert f"{folder / 'routers.jsonl'}: no records; logging.router_every_steps switches them on." in read(folder).text
    load = [[0.0, 4, 0, 0], [0.25, 1.75, 1, 1]]
    write_lines(folder / "routers.jsonl", [router_record(2), router_record(4, moe_load=load)])
    found = read(folder)
    first, second = found.data["heatmaps"]
    assert second["tokens"] == [2000, 4000] and (second["layers"], second["experts"]) == (2, 4)
    assert first["codes"] != second["codes"]
    (entropy,) = found.curves("moe_load_entropy")
    assert entropy["low"] == [1.0, 0.0] and found.data["axes"][1]["steps"] == [2, 4]
    titles = [value for name, value in found.attributes if name == "title"]
    assert "layer 0, expert 1: 4" in titles and "layer 1, expert 0: 0.25" in titles
    assert {"4.00", "0.25", "1.75"} <= {*found.cells}


def test_several_runs(tmp_path: Path) -> None:
    one, two = folder_of(tmp_path, "one"), folder_of(tmp_path, "two", steps=5, lr=0.5)
    (one / "config.yaml").write_text(CONFIG)
    (two / "config.yaml").write_text(CONFIG.replace("first", "second").replace("max_lr: 0.001", "max_lr: 0.5"))
    found = read(one, two)
    first, second = found.curves("lr")
    assert (first["label"], second["label"]) == ("first, learning rate", "second, learning rate")
    assert first["colour"] != second["colour"] and second["mean"] == [0.5] * 5
    assert [len(found.data["axes"][curve["axis"]]["steps"]) for curve in (first, second)] == [8, 5]
    row = found.cells.index("optimizer.max_lr")
    assert found.cells[row : row + 3] == ["optimizer.max_lr", "0.001", "0.5"] and "seed" not in found.cells
    assert found.text.count("config.yaml of") == 2
    same = read(one, one)
    assert [curve["label"] for curve in same.curves("lr")] == [f"{one}, learning rate"] * 2
    assert "No value differs." in same.text


@pytest.mark.parametrize(
    "config", ["", "[", "a: &x [*x]", "- 1", "name: 3\nphases: 4", "phases: [{name: stable, data: []}]", "\udcff"]
)
def test_a_config_of_another_kind(tmp_path: Path, config: str) -> None:
    folder = folder_of(tmp_path)
    (folder / "config.yaml").write_bytes(config.encode(errors="surrogateescape"))
    assert "share asked" in read(folder).text


JUNK = (
    "routers.jsonl",
    "bad_steps.jsonl",
    "starts.jsonl",
    "doctor/a.json",
    "checkpoints/rollbacks.json",
)


@pytest.mark.parametrize("name", JUNK)
def test_junk_in_other_files(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    whole = read(folder).data["charts"]
    (folder / name).write_text(f'junk\n[]\n{{"step": 1}}\n{{"step": 1{"0" * 400}}}\n{{"event": "start"}}\n')
    assert len(read(folder).data["charts"]) == len(whole)
