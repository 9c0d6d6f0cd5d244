"""`jetmoe report --html`, and the page that a run writes at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetmoe_megatron.cli import main
from jetmoe_megatron.errors import InputError
from jetmoe_megatron.report.write import print_reports, write_report
from tests.report.run_folders import Page, metrics_line, write_lines
from tests.support import jetmoe, metrics, small_run, training, write_run


def folder_of(tmp_path: Path, name: str) -> Path:
    write_lines(tmp_path / name / "metrics.jsonl", [metrics_line(step) for step in range(1, 9)])
    return tmp_path / name


def test_a_run_writes_its_page(tmp_path: Path, data: dict[str, str]) -> None:
    tree = small_run(tmp_path, data, guard={"on_bad_step": "skip"}, checkpoint={"every_tokens": 1024})
    tree["evaluation"] = {"every_steps": 3, "sequences": 5, "data": [{"name": "v", "path": data["held_out"]}]}
    run_file, folder = write_run(tmp_path, tree), tmp_path / "run"
    assert training(run_file, "debug.max_steps=5").run(2).returncode == 0
    assert training(run_file).run(2).returncode == 0
    found, lines = Page((folder / "report.html").read_text()), metrics(folder)
    assert len(lines) == 8
    for key in ("lm_loss", "lr", "grad_norm", "tokens_per_second", "moe_balance_loss", "goodput"):
        curve, *_ = found.curves(key)  # routers.jsonl has some of the same names
        assert curve["mean"] == [line[key] for line in lines]
    (held_out,) = found.curves("held_out_loss/v")
    assert held_out["mean"] == [line["held_out_loss/v"] for line in lines if "held_out_loss/v" in line]
    chart = found.data["charts"][0]
    assert [phase["name"] for phase in chart["phases"]] == ["stable", "decay"]
    assert [mark["at"] for mark in chart["marks"] if mark["text"].startswith("checkpoint")] == [1024, 1280, 2048]
    assert [mark["at"] for mark in chart["marks"] if mark["text"].startswith("step")] == [6 * 256]  # the restart
    row = found.cells.index("code", found.cells.index("share asked"))
    assert found.cells[row - 1] == "stable" and found.cells[row + 3] == "75.00%"
    before = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    again = jetmoe("report", folder, "--html")
    assert again.returncode == 0 and again.stdout.endswith(f"\nwritten: {folder / 'report.html'}\n")
    assert (folder / "report.html").read_text() == before


def test_one_bad_run_of_several_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good, page = folder_of(tmp_path, "good"), tmp_path / "page.html"
    missing = f"{tmp_path / 'bad/metrics.jsonl'}: no steps recorded; is {tmp_path / 'bad'} a run folder?"
    assert main(["report", str(good), str(tmp_path / "bad"), "--html", str(page)]) == 0
    said = capsys.readouterr()
    assert said.err == f"warning: left out: {missing}\n" and said.out.startswith(f"{good}:\nsteps ")
    assert f"Left out: {missing}" in Page(page.read_text()).text
    assert main(["report", str(good), str(good)]) == 0
    assert capsys.readouterr().out.count("steps ") == 2


def test_all_bad_runs_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'b/metrics.jsonl'}: no steps")
    assert [*tmp_path.iterdir()] == []


def test_one_picture_is_of_one_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", "a", "b", "--plot"])
    assert ended.value.code == 2
    assert main(["report", "a", "b", "--plot", str(tmp_path / "x.png")]) == 2


@pytest.mark.parametrize("name", ["no/page.html", "."])
def test_a_page_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    run = folder_of(tmp_path, "run")
    with pytest.raises(InputError, match="cannot write"):
        print_reports([run], tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["metrics.jsonl", "run"]


def test_the_end_of_a_run_is_never_in_danger(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_report(tmp_path / "nothing")
    run = folder_of(tmp_path, "run")
    (run / "report.html").mkdir()
    write_report(run)
    (run / "metrics.jsonl").write_bytes(b"\xff\n")
    write_report(run)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(
        line.startswith("warning: ") and "report.html: not written: " in line for line in said
    )
    assert [*(run / "report.html").iterdir()] == []
