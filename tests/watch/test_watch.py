"""`jetmoe watch` of runs that train, wait, are damaged, and are taken back to an earlier step."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_tools.locks import open_locked
from tests.pseudo_terminal import PseudoTerminal
from tests.support import REPO, command, environment, jetmoe, metrics, pretrain, small_run, write_run
from tests.warm import Command, wait

EVERY_LINE = ("evaluation.every_steps=2", "evaluation.sequences=4", "logging.router_every_steps=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """The run folder of all 8 steps."""
    folder = tmp_path_factory.mktemp("watch")
    tree = small_run(folder, data, evaluation__data=[{"name": "v", "path": data["held_out"]}])
    assert pretrain(1, write_run(folder, tree), *EVERY_LINE).returncode == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def once(folder: Path, columns: int = 140) -> str:
    variables = environment() | {"COLUMNS": str(columns)}
    shown = Command(["jetmoe", "watch", folder, "--once"], variables, REPO).run()
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "\x1b" not in shown.stdout
    assert {len(line) for line in shown.stdout.splitlines()} == {columns}
    return shown.stdout


def seen(folder: Path) -> set[tuple[str, float]]:
    return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_what_a_run_shows(run: Path) -> None:
    before, last = seen(run), metrics(run)[-1]
    text = once(run)
    assert seen(run) == before
    assert f"small: {run} " in text and "│ done " in text
    assert "step 8 of 8 (100.0%) | 2,048 tokens | phase decay | 0s left | last step " in text
    for name, value in (
        ("loss", f"{last['lm_loss']:.4f}"),
        ("  on v", f"{last['held_out_loss/v']:.4f}"),
        ("gradient norm", f"{last['grad_norm']:.3g}"),
        ("load", f"{last['moa_load_imbalance']:.3f}/{last['moe_load_imbalance']:.3f}"),
        ("tokens/s", f"{last['tokens_per_second']:,.0f}"),
        ("goodput", f"{last['goodput']:.2%}"),
        ("checkpoint", "tokens_2048, "),
    ):
        assert re.search(rf"│ {name} +{re.escape(value)}", text), name
    loads = json.loads((run / "routers.jsonl").read_text().splitlines()[-1])
    for kind, title in (("moa", "attention"), ("moe", "MLP")):
        assert f"routers of {title}, step 8" in text
        for layer, load_E in enumerate(loads[f"{kind}_load"]):
            row = rf"│ +{layer} [x▁▂▃▄▅▆▇█]{{4}} +{max(load_E):.2f} {loads[f'{kind}_gate_entropy'][layer]:.2f}"
            assert re.search(row, text), row


@pytest.mark.parametrize("columns", [20, 40, 80, 119, 200])
def test_any_width(run: Path, columns: int) -> None:
    assert "training" in once(run, columns)


def test_a_run_that_trains(run: Path) -> None:
    with open_locked(run / ".lock") or pytest.fail("locked"):
        assert "│ training " in once(run)
        (run / "metrics.jsonl").unlink()
        assert "│ starting: waits for the first step " in once(run)


def test_what_is_no_run_yet_or_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "waits for the run to begin" in once(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    for name in ("other", "none"):
        refused = jetmoe("watch", tmp_path / name)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr == f"error: {tmp_path}/{name}: not a run folder: it has no config.yaml\n"
    for every in ("0", "inf", "nan"):
        refused = jetmoe("watch", tmp_path / "empty", "--every", every)
        said = f"error: --every: must be from 0.1 to 86400 seconds, not {every}\n"
        assert (refused.returncode, refused.stderr) == (2, said)


HOSTILE: dict[str, Any] = {
    "phase": "\x1b[2J[bold red]x[/]\u202e",
    "alarms": {"[link=a]\x07": "\r\n", "deep": [1]},
    "lm_loss": float("nan"),
    "lr": "text",
    "tokens_per_second": float("inf"),
    "data_wait_seconds": float("nan"),
    "save_stall_seconds": float("inf"),
    "step_seconds": 0,
    "wall_seconds": "x",
    "goodput": [1],
    "grad_norm": None,
    "held_out_loss/\x1b]0;t\x07": 1.5,
    "held_out_loss": True,
}


def test_hostile_text_and_wrong_types(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as lines:
        lines.write(json.dumps({"step": 9, "tokens": 2304} | HOSTILE) + "\n")
        lines.write("\x1b[2J\n" + json.dumps({"step": 10**30, "tokens": 1}) + '\n{"step": 11, "tok')
    with open(run / "routers.jsonl", "a") as lines:
        lines.write(
            json.dumps({"step": 9, "tokens": 2304, "moa_load": [[0, float("nan"), 9, -1]], "moe_load": "x"}) + "\n"
        )
    (run / "bad_steps.jsonl").write_text(json.dumps({"step": 9, "reason": "\x1b[2J"}) + "\n")
    (run / "starts.jsonl").write_text(
        '{"event": "end", "time": "t\\u001b", "start": "a-0", "tokens": 1, "reason": "[/]"}\n'
    )
    text = once(run)
    assert r"phase \x1b[2J[bold red]x[/]\u202e" in text and "time left unknown" in text
    assert r"step 9: [link=a]\x07: \r\n" in text
    assert r"on \x1b]0;t\x07" in text
    assert re.search(r"│ +0 x\?█x +", text) and "routers of MLP" not in text


def test_on_a_terminal_it_follows_the_run(run: Path) -> None:
    """Until Ctrl-C, which gives back what was on the terminal before."""
    with PseudoTerminal(140) as terminal:
        variables = environment() | {"TERM": "xterm-256color"}
        watching = Command(["jetmoe", "watch", run, "--every", "0.1"], variables, REPO)
        processes = watching.start(1, terminal.path, terminal.path)
        until(lambda: "step 8 of 8" in terminal.text)
        with open(run / "metrics.jsonl", "a") as lines:
            lines.write(json.dumps(metrics(run)[-1] | {"step": 9, "tokens": 2304, "phase": "more"}) + "\n")
        until(lambda: "step 9 of 8" in terminal.text)
        os.kill(processes[0].pid, signal.SIGINT)
        assert wait(processes, 60) == 130
    assert "\x1b[?1049h" in terminal.text
    assert terminal.text.partition("\x1b[?1049l")[2].endswith("stopped: nothing was written\r\n")


def until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_needs_no_torch(run: Path) -> None:
    code = "import sys; from jetmoe_megatron.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    shown = command(sys.executable, "-c", code, "watch", run, "--once")
    assert (shown.returncode, shown.stderr) == (0, "") and "step 8 of 8" in shown.stdout
