"""Every command explains itself: a description, an example that it accepts, and help for each argument."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

import data_tools.cli
from jetmoe_megatron.cli import build_parser
from jetmoe_megatron.config import Run


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of all its commands, at any depth."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from commands(command)


PARSERS = {parser.prog: parser for parser in commands(build_parser())}


def interrupted(*arguments: object) -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", [name for name, parser in PARSERS.items() if parser.get_default("run")])
def test_ctrl_c_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the command has nothing else to say, what is true of all that it has done."""
    stopped = PARSERS[name].get_default("stopped")
    assert data_tools.cli.run(argparse.Namespace(run=interrupted, stopped=stopped)) == 130
    kept = "the indices that were built are kept; run the same command again to continue"
    wanted = kept if name == "jetmoe data prepare" else "nothing was written"
    assert capsys.readouterr().err == f"stopped: {wanted}\n"


def test_all_are_looked_at() -> None:
    wanted = {"jetmoe data tokenize", "jetmoe data mix", "jetmoe convert to-hf", "jetmoe convert", "jetmoe report"}
    assert wanted < PARSERS.keys() and len(PARSERS) == 27


@pytest.mark.parametrize("name", PARSERS)
def test_a_command_explains_itself(name: str) -> None:
    parser = PARSERS[name]
    assert parser.description and re.match(r"[A-Z].*[\w.:)]$", parser.description, re.DOTALL)
    assert "`" not in parser.description  # a docstring's
    for action in parser._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), f"{name}: {action.dest}"
        for choice in getattr(action, "_choices_actions", []):
            assert choice.help, f"{name}: {choice.dest}"
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", PARSERS)
def test_its_examples_are_accepted(name: str) -> None:
    examples = [line.strip() for line in PARSERS[name].format_help().partition("example")[2].splitlines()]
    examples = [line for line in examples if line.startswith("jetmoe ")]
    assert examples
    for example in examples:
        assert f"{example} ".startswith(f"{name} ")
        build_parser().parse_args(shlex.split(example)[1:])


def test_every_command_has_an_example() -> None:
    """Every command of `jetmoe` is in its examples."""
    top = build_parser()
    examples = top.format_help().partition("examples:")[2]
    names = next(action.choices for action in top._actions if isinstance(action, argparse._SubParsersAction))
    assert [name for name in names if f"jetmoe {name} " not in examples] == []


@pytest.mark.parametrize("name", PARSERS)
def test_the_settings_that_it_names_are_there(name: str) -> None:
    for section, key in re.findall(r"\b(\w+)\.(?!yaml\b)(\w+)", PARSERS[name].format_help()):
        model = Run.model_fields[section].annotation if section in Run.model_fields else None
        if isinstance(model, type) and issubclass(model, BaseModel):
            assert key in model.model_fields, f"{section}.{key}"
