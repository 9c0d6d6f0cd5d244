"""`jetmoe report`, and commands that do not exist."""

from __future__ import annotations

import json
from typing import Any

from tests.malformed.world import LONG, Case, World


def _report(name: str, content: Any, said: str = r"metrics\.jsonl: ") -> Case:
    def make(world: World) -> list[Any]:
        if content is not None:
            world.write("run/metrics.jsonl", content)
        return ["jetmoe", "report", world / "run"]

    return Case(f"report, {name}", make, said)


def _page(name: str, file: str, said: str) -> Case:
    """Of a run that is there: the page's own name is wrong."""
    line = {"step": 1, "phase": "a", "tokens": 2, "lm_loss": 1.0, "tokens_per_second": 1.0}

    def make(world: World) -> list[Any]:
        world.write("run/metrics.jsonl", json.dumps(line) + "\n")
        return ["jetmoe", "report", world / "run", "--html", world / file]

    return Case(f"report, {name}", make, said)


def _metrics_folder(world: World) -> list[Any]:
    (world / "run/metrics.jsonl").mkdir(parents=True)
    return ["jetmoe", "report", world / "run"]


REPORT = [
    _report("nothing", None, "no steps recorded"),
    _report("empty", "", "no steps recorded"),
    _report("text", "once upon a time\n"),
    _report("binary", bytes(range(256))),
    _report("a list", "[]\n[]\n"),
    _report("numbers", "1\n2\n"),
    _report("null", "null\n"),
    _report("other records", '{"epoch": 1}\n'),
    _report("steps alone", '{"step": 1}\n'),
    _report("steps of text", '{"step": "1", "tokens": "2", "lm_loss": "low", "tokens_per_second": "fast"}\n'),
    _report(
        "a loss beyond every float", f'{{"step": 1, "tokens": 2, "lm_loss": 1{"0" * 400}, "tokens_per_second": 1}}'
    ),
    _report("rates beyond every float", f'{{"step": 1, "tokens": 2, "lm_loss": 1, "tokens_per_second": 1{"0" * 400}}}'),
    _report("a hostile value", '{"step": 1, "tokens": "\\u001b[2J", "lm_loss": 1, "tokens_per_second": 1}'),
    Case("report, a hostile name", lambda world: ["jetmoe", "report", world / "a\x1b[2J\nb"], r"a\\x1b\[2J\\nb"),
    _report("deeply nested", "[" * 100_000 + "\n"),
    _page("a page in no folder", "no/page.html", r"cannot write .*no/page\.html: No such file or directory"),
    _page("a page that is a folder", "run", "cannot write .*run: Is a directory"),
    Case("report, two bad runs", lambda world: ["jetmoe", "report", world / "a", world / "b"], "no steps", warns=True),
    Case("report, two in a picture", lambda world: ["jetmoe", "report", "a", "b", "--plot", "c.png"], "draws one run"),
    Case("report, metrics a folder", _metrics_folder, "no steps recorded"),
    Case(
        "report, a file", lambda world: ["jetmoe", "report", world.write("f", "")], "no steps recorded|Not a directory"
    ),
    Case("report, a name too long", lambda world: ["jetmoe", "report", LONG], "x{300}.*File name too long"),
]

USAGE = [
    Case("no command", lambda world: ["jetmoe"], "the following arguments are required: COMMAND"),
    Case("an unknown command", lambda world: ["jetmoe", "train"], "invalid choice: 'train'"),
    Case("an unknown data command", lambda world: ["jetmoe", "data", "shuffle"], "invalid choice: 'shuffle'"),
    Case("data_tools, no command", lambda world: ["data_tools"], "the following arguments are required: COMMAND"),
]

CASES = [*REPORT, *USAGE]
