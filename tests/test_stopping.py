"""docs/stopping.md, the help of the trainer and the SLURM script say what `stopping.py` says."""

from __future__ import annotations

import re

import jetmoe_megatron.stopping as stopping
from jetmoe_megatron.config.schema import Parallel
from jetmoe_megatron.stopping import STOP_SIGNALS, ExitStatus
from pretrain_jetmoe import build_parser
from tests.support import REPO

PAGE = (REPO / "docs/stopping.md").read_text()
SCRIPT = (REPO / "scripts/slurm/pretrain_jetmoe.sbatch").read_text()


def test_the_page_has_each_status() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.M)
    assert [row[:3] for row in rows] == [(str(int(s)), s.meaning, s.advice) for s in ExitStatus]
    assert [row[3] for row in rows] == ["yes" if status.comes_back else "no" for status in ExitStatus]


def test_the_help_has_each_status() -> None:
    text = " ".join(build_parser().format_help().split())
    assert all(f"{int(status)} {status.meaning}" in text for status in ExitStatus)


def test_the_page_has_each_waiting_time() -> None:
    told = {name: value for value, name in re.findall(r"\| ([^|]+?)(?: s)? \| `(\w+)` \|$", PAGE, re.M)}
    waits = {name: value for name, value in vars(stopping).items() if isinstance(value, float)}
    echo = told.pop("STOP_SIGNALS")
    assert {name: float(value) for name, value in told.items()} == waits
    usual, ctrl_c = sorted(set(STOP_SIGNALS.values()), reverse=True)
    assert echo == f"{usual:g} s, Ctrl-C {ctrl_c:g}"


def test_what_others_wait_for_is_as_the_page_says() -> None:
    assert f"--wait={_of_the_page('`srun --wait`')}" in SCRIPT
    assert f"--signal=B:USR1@{_of_the_page('SLURM')}" in SCRIPT
    assert Parallel().start_timeout_minutes * 60 == int(_of_the_page("all ranks, up to the end of the first step"))
    assert Parallel().timeout_minutes * 60 == int(_of_the_page("all ranks, in training"))


def _of_the_page(who: str) -> str:
    return re.search(rf"^\| {re.escape(who)} \| .* \| (\d+) s", PAGE, re.M)[1]  # type: ignore[index]
