"""Any malformed input of a command gives one line that names it and exit status 2, and no file is changed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.printing import printable_lines
from tests.malformed import (
    cases_checkpoints,
    cases_config,
    cases_convert,
    cases_data,
    cases_data_tools,
    cases_report,
    cases_tokenizers,
)
from tests.malformed.world import Case, Good, World, run
from tests.support import command, metrics

GROUPS: dict[str, list[Case]] = {
    "config": cases_config.CASES,
    "data": cases_data.CASES,
    "checkpoint": cases_checkpoints.CASES,
    "tokenizer": cases_tokenizers.CASES,
    "tool": [*cases_data_tools.CASES, *cases_convert.CASES, *cases_report.CASES],
}
CASES = {f"{group}: {case.name}": case for group, cases in GROUPS.items() for case in cases}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("good"))


@pytest.fixture
def world(tmp_path: Path, good: Good) -> World:
    return World(tmp_path, good)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_line_status_2_and_nothing_written(case: Case, world: World) -> None:
    arguments = case.make(world)
    before = world.snapshot()
    status, _, err = run(*arguments, cwd=world / "cwd", scratch=world / "tmp")
    lines = err.splitlines()
    assert status == 2, err
    assert printable_lines(err) == err  # nothing of a file or a name reaches the terminal as it is
    errors = [line for line in lines if re.match(r"(\S+.*: )?error: ", line)]
    usage = [line for line in lines if line.startswith(("usage: ", "    "))] if "usage: " in err else []
    said = [line for line in lines if line.startswith(("note: ", "warning: ") if case.warns else "note: ")]
    assert len(errors) == 1 and len(errors + usage + said) == len(lines), err
    assert re.search(case.said, errors[0]), errors[0]
    expected = {_renamed(name, case.renamed): content for name, content in before.items()}
    after = world.snapshot()
    assert after.keys() == expected.keys()
    assert after == expected


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("checkpoint: ", "data: "))])
def test_a_dry_run_refuses_what_a_start_refuses(name: str, world: World) -> None:
    """And sets nothing aside."""
    case = CASES[name]
    program, *arguments = case.make(world)
    if program != "pretrain":
        pytest.skip("another command")
    before = world.snapshot()
    status, _, err = run(program, *arguments, "--dry-run", cwd=world / "cwd", scratch=world / "tmp")
    *warnings, error = err.splitlines()
    assert status == 2, err
    assert error.startswith("error: ") and all(line.startswith("warning: ") for line in warnings), err
    said = case.said.replace(".damaged", "") if case.renamed else case.said
    assert re.search(said, error), error
    assert world.snapshot() == before


def _renamed(name: str, renamed: dict[str, str]) -> str:
    for old, new in renamed.items():
        if name == old or name.startswith(f"{old}/"):
            return new + name.removeprefix(old)
    return name


def test_the_list_is_as_long_as_promised() -> None:
    assert len(CASES) == sum(map(len, GROUPS.values())) >= 800


PROGRAMS = {
    "pretrain": [sys.executable, "pretrain_jetmoe.py"],
    "jetmoe": ["jetmoe"],
    "data_tools": [sys.executable, "-m", "data_tools"],
}


@pytest.mark.parametrize(
    "name",
    [
        "config: file, a key twice",
        "checkpoint: the only one, common.pt missing",
        "tokenizer: tokenize, SentencePiece cut",
        "tool: merge, dtype unknown",
    ],
)
def test_the_commands_themselves_do_what_their_forks_do(name: str, world: World) -> None:
    """In processes of their own, in the same world."""
    program, *arguments = CASES[name].make(world)
    status, _, err = run(program, *arguments, cwd=world / "cwd", scratch=world / "tmp")
    for new, old in ((new, old) for old, new in CASES[name].renamed.items()):
        (world / new).rename(world / old)
    real = command(*PROGRAMS[program], *arguments)
    assert (real.returncode, real.stderr) == (status, err)


def junk(name: str) -> Callable[[World], Any]:
    lines = [b"[]", b"7", b"null", b'{"epoch": 1}', b'{"step": "x"}', bytes(range(128, 256)), b"[" * 100_000]
    content = b"\n".join([*lines, b'{"step": 1, "cut o'])
    return lambda world: world.write(f"run/{name}", content)


HARMLESS: dict[str, Callable[[World], Any]] = {
    "junk for metrics": junk("metrics.jsonl"),
    "junk for bad steps": junk("bad_steps.jsonl"),
    "junk for the configuration": junk("config.yaml"),
    "names that are like checkpoints": lambda world: [
        (world / "run/checkpoints" / name).mkdir()
        for name in ("tokens_", "tokens_x", "tokens_-1", "tokens_1e3", "tokens_99999.old", "tokens_2048 ")
    ],
    "an unfinished checkpoint": lambda world: world.write("run/checkpoints/tokens_1536.partial-00/x", ""),
    "a newer checkpoint that is damaged": lambda world: world.spoil("run/checkpoints/tokens_1024/common.pt", "cut"),
    "a newer checkpoint that is a file": lambda world: world.write("run/checkpoints/tokens_1792", "x"),
}


@pytest.mark.parametrize("harm", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_does_not_stop_a_run(harm: Callable[[World], Any], world: World) -> None:
    world.put("run")
    harm(world)
    status, _, err = run(*world.train(), cwd=world / "cwd", scratch=world / "tmp")
    assert status == 0, err
    assert all(line.startswith("warning: ") for line in err.splitlines())
    assert [record["step"] for record in metrics(world / "run")][-4:] == [5, 6, 7, 8]
    assert json.loads((world / "run/checkpoints/tokens_2048/progress.json").read_text())["tokens"] == 2048
