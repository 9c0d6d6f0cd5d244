"""Whatever is wrong with what a command is given: one line that names it, exit status 2, and no file changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.malformed import cases_checkpoints, cases_config, cases_data, cases_tokenizers, cases_tools
from tests.malformed.commands import Commands
from tests.malformed.world import Case, Good, World

GROUPS: dict[str, list[Case]] = {
    "config": cases_config.CASES,
    "data": cases_data.CASES,
    "checkpoint": cases_checkpoints.CASES,
    "tokenizer": cases_tokenizers.CASES,
    "tool": cases_tools.CASES,
}
CASES = {f"{group}: {case.name}": case for group, cases in GROUPS.items() for case in cases}


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as commands:
        yield commands


@pytest.fixture(scope="module")
def good(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("good"), commands)


@pytest.fixture
def world(tmp_path: Path, good: Good) -> World:
    return World(tmp_path, good)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_line_status_2_and_nothing_written(case: Case, world: World, commands: Commands) -> None:
    arguments = case.make(world)
    before = world.snapshot()
    status, _, err = commands.run(*arguments, cwd=world / "cwd", scratch=world / "tmp")
    lines = err.splitlines()
    assert status == 2, err
    errors = [line for line in lines if re.match(r"(\S+.*: )?error: ", line)]
    usage = [line for line in lines if line.startswith(("usage: ", "    "))] if "usage: " in err else []
    said = [line for line in lines if line.startswith(("note: ", "warning: ") if case.warns else "note: ")]
    assert len(errors) == 1 and len(errors + usage + said) == len(lines), err
    assert re.search(case.said, errors[0]), errors[0]
    expected = {_renamed(name, case.renamed): content for name, content in before.items()}
    after = world.snapshot()
    assert after.keys() == expected.keys()
    assert after == expected


def _renamed(name: str, renamed: dict[str, str]) -> str:
    for old, new in renamed.items():
        if name == old or name.startswith(f"{old}/"):
            return new + name.removeprefix(old)
    return name


def test_the_list_is_as_long_as_promised() -> None:
    assert len(CASES) == sum(map(len, GROUPS.values())) >= 200
