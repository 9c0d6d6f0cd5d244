"""The table and the curves of `jetmoe report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.printing import printable_lines
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.report.lines import steps_of
from jetmoe_megatron.report.plot import draw_curves
from jetmoe_megatron.report.table import report
from tests.monitor.test_monitor import record
from tests.report.run_folders import write_lines


def test_report(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(s)) + "\n" for s in (1, 2)))
    with open(path, "a") as file:
        file.write(json.dumps(record(3, **{"held_out_loss": 2.5, "held_out_loss/code": 2.0})) + "\n")
    lines = [line.split(maxsplit=2) for line in report(tmp_path).splitlines()]
    assert ["from", "code", "225"] in lines
    assert ["held-out", "loss", "2.5000"] in lines
    assert ["first", "loss", "4.0000"] in lines


def test_report_prints_no_name_raw(tmp_path: Path) -> None:
    """A name cannot clear the screen, forge a row, turn one around, or end the command in a traceback."""
    names = ["\x1b[2J", "a\nlast loss  0.0001", "\u202e1", "\udcff", "a\u2028b", "\u200b"]
    hostile = {f"dataset_tokens/{name}": 1 for name in names} | {f"held_out_loss/{name}": 2.0 for name in names}
    line = json.dumps(record(1, **{"held_out_loss": 2.5, **hostile}))
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    said = report(tmp_path)
    plain = {"held_out_loss": 2.5} | {
        f"{kind}/{i}": 1 for i in range(6) for kind in ("dataset_tokens", "held_out_loss")
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1, **plain)) + "\n")
    assert len(said.splitlines()) == len(report(tmp_path).splitlines())
    assert said.encode() and printable_lines(said) == said


def test_report_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no steps recorded"):
        report(tmp_path)


def test_report_draws_the_curves(tmp_path: Path) -> None:
    records = [record(step, moa_balance_loss=1.0, moe_balance_loss=1.1) for step in range(1, 9)]
    records[3]["held_out_loss/prose"] = 4.0
    records[5]["lm_loss"] = float("nan")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + "junk\n")
    draw_curves(tmp_path, tmp_path / "curves.svg")
    picture = (tmp_path / "curves.svg").read_text()
    assert picture.count("<path") > 30 and "held-out" in picture.replace("<!--", "")
    for path in (tmp_path / "no/curves.png", tmp_path / "curves.xyz"):
        with pytest.raises(UserError, match=r"curves\.(png|xyz): cannot draw there"):
            draw_curves(tmp_path, path)
    with pytest.raises(UserError, match="no steps recorded"):
        draw_curves(tmp_path / "elsewhere", tmp_path / "curves.png")


def test_lines_of_other_versions(tmp_path: Path) -> None:
    """Keys may be missing; a line whose numbers are no numbers of a run is left out."""
    lines = [
        '{"step": 1, "tokens": 100, "phase": "a"}',
        '{"step": 2, "tokens": 200, "lm_loss": "low", "grad_norm": null}',
    ]
    lines += [f'{{"step": 3, "tokens": 300, "lm_loss": 1{"0" * 400}}}', '{"step": 4, "tokens": 1e400}', "cut off"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [line.split() for line in report(tmp_path).splitlines()][:2] == [["steps", "2"], ["tokens", "200"]]
    assert "loss" not in report(tmp_path)


def test_steps_go_up(tmp_path: Path) -> None:
    """Two writers of one folder, or files that somebody put together."""
    lines = [record(step) for step in (1, 2, 3, 2, 3, 4)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert [line["step"] for line in steps_of(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
