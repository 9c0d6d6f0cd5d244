"""Checkpoints: damaged, changed with checksums that match, of another run; and other things in their place."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from typing import Any

from tests.malformed import cases_start_from
from tests.malformed.world import NEWEST, Case, World

FILES = (".metadata", "__0_0.distcp", "common.pt", "metadata.json", "run.yaml", "progress.json", "checksums.json")
HOW = ("missing", "empty", "cut", "flipped", "longer", "a folder")
DEEP = "[" * 100_000
OLDER = "run/checkpoints/tokens_512"
ASIDE = {NEWEST: f"{NEWEST}.damaged"}
OLDER_ASIDE = {OLDER: f"{OLDER}.damaged"}


def _damaged_source(file: str, how: str) -> Case:
    """A run that would start from it is refused before anything begins."""

    def make(world: World) -> list[Any]:
        world.put("run")
        world.spoil(f"{NEWEST}/{file}", how)
        return world.branch()

    named = "" if file == "checksums.json" else file  # of which nothing says what it should be
    return Case(f"start_from, {file} {how}", make, f"start_from: .*tokens_1024 is damaged: {re.escape(named)}")


def _damaged_only(file: str, how: str) -> Case:
    """The only one of a run: set aside, and the run does not begin anew."""

    def make(world: World) -> list[Any]:
        world.only_one_checkpoint()
        world.spoil(f"{NEWEST}/{file}", how)
        return world.train()

    said = "tokens_1024.damaged: is damaged, and no whole checkpoint is left"
    return Case(f"the only one, {file} {how}", make, said, ASIDE, warns=True)


def _sealed(name: str, harm: Callable[[World], Any], said: str) -> tuple[Case, Case]:
    """Changed, with checksums that fit: as a run's own checkpoint, and as the start of another run."""

    def own(world: World) -> list[Any]:
        world.put("run")
        harm(world)
        world.seal()
        return world.train()

    def source(world: World) -> list[Any]:
        world.put("run")
        harm(world)
        world.seal()
        return world.branch()

    return Case(f"own, sealed {name}", own, said), Case(f"start_from, sealed {name}", source, said)


def _progress(name: str, edit: Callable[[Any], Any]) -> tuple[Case, Case]:
    return _sealed(
        f"progress {name}",
        lambda world: world.edit_json(f"{NEWEST}/progress.json", edit),
        r"tokens_1024/progress\.json: ",
    )


def _progress_text(name: str, text: str | bytes) -> tuple[Case, Case]:
    return _sealed(
        f"progress {name}", lambda world: world.write(f"{NEWEST}/progress.json", text), r"tokens_1024/progress\.json: "
    )


def _run_text(name: str, text: str | bytes, said: str) -> tuple[Case, Case]:
    return _sealed(
        f"run.yaml {name}", lambda world: world.write(f"{NEWEST}/run.yaml", text), rf"tokens_1024/run\.yaml{said}"
    )


def _checksums(name: str, edit: Any) -> Case:
    """The list itself is wrong: the checkpoint is damaged, and the only one."""

    def make(world: World) -> list[Any]:
        world.only_one_checkpoint()
        file = f"{NEWEST}/checksums.json"
        world.edit_json(file, edit) if callable(edit) else world.write(file, edit)
        return world.train()

    return Case(f"checksums {name}", make, "is damaged, and no whole checkpoint is left", ASIDE, warns=True)


LEDGER = {
    "blend": {"content": {}, "sequence_length": 32},
    "began": {"sample": 0, "sequences": {}},
    "read": {"sample": 7, "sequences": {}},
    "past": [],
}


def _halve(progress: Any) -> None:
    progress["tokens"] //= 2
    progress["data"]["read"]["sample"] //= 2


def _notes(name: str, content: Any) -> Case:
    def make(world: World) -> list[Any]:
        world.put("run")
        world.write("run/checkpoints/rollbacks.json", content)
        return world.train()

    return Case(f"rollbacks {name}", make, r"rollbacks\.json: ")


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def edit(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return edit


def _drop(*path: str) -> Callable[[Any], None]:
    def edit(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return edit


PROGRESS = [
    case
    for pair in (
        _progress("a list", lambda progress: [progress]),
        _progress("no tokens", _drop("tokens")),
        _progress("no data", _drop("data")),
        _progress("tokens negative", _set("tokens", to=-256)),
        _progress("tokens a fraction", _set("tokens", to=1024.5)),
        _progress("tokens text", _set("tokens", to="1024")),
        _progress("tokens true", _set("tokens", to=True)),
        _progress("tokens null", _set("tokens", to=None)),
        _progress("tokens of 30 digits", _set("tokens", to=10**30)),
        _progress("data a list", _set("data", to=[])),
        _progress("data empty", _set("data", to={})),
        _progress("no blend", _drop("data", "blend")),
        _progress("blend text", _set("data", "blend", to="x")),
        _progress("no content in the blend", _drop("data", "blend", "content")),
        _progress("no sequence length in the blend", _drop("data", "blend", "sequence_length")),
        _progress("a blend of the past is missing", _set("data", "past", to=[{"read": {}}])),
        _progress("sample negative", _set("data", "read", "sample", to=-1)),
        _progress("sample text", _set("data", "read", "sample", to="many")),
        _progress("sample a fraction", _set("data", "began", "sample", to=0.5)),
        _progress("sequences a list", _set("data", "read", "sequences", to=[1, 2])),
        _progress("sequences negative", _set("data", "read", "sequences", "code", to=-3)),
        _progress("an unknown key in the position", _set("data", "read", "place", to=1)),
        _progress("past text", _set("data", "past", to="none")),
        _progress_text("empty", ""),
        _progress_text("binary", bytes(range(256))),
        _progress_text("deeply nested", DEEP),
        _progress_text("two objects", "{} {}"),
    )
    for case in pair
]

# What a branch leaves behind, the run itself takes up.
OWN_PROGRESS = [
    _progress("guard a list", _set("guard", to=[1]))[0],
    _progress("guard of another version", _set("guard", "windows", to=[]))[0],
    _progress("guard's losses text", _set("guard", "losses", to="low"))[0],
    _progress("guard's losses of text", _set("guard", "losses", to=["low"]))[0],
    _progress("guard's steps of text", _set("guard", "bad", to=["3"]))[0],
    _progress("branched_at text", _set("branched_at", to="768"))[0],
    *_progress("began after what was read", _set("data", "began", "sample", to=2**52)),
    *_progress("began after a data set's sequences", _set("data", "began", "sequences", to={"code": 10**12})),
    *_progress("its data at another place", _set("data", "read", "sample", to=2**40)),
    *_progress("its data in longer sequences", _set("data", "blend", "sequence_length", to=2**20)),
    _progress("tokens of another place", _set("tokens", to=512))[0],
    _sealed(
        "what another checkpoint holds",
        lambda world: world.edit_json(f"{NEWEST}/progress.json", _halve),
        "tokens_1024: .*512 tokens",
    )[0],
]

RUNS = [
    case
    for pair in (
        _run_text("empty", "", ": .*found nothing"),
        _run_text("a list", "- a\n", ": .*found a list"),
        _run_text("broken", "a: [", ".* not valid YAML"),
        _run_text("binary", bytes(range(256)), ": not a UTF-8 text file"),
        _run_text("of another program", "name: x\nlearning_rate: 3\n", ": .*required key is missing"),
        _run_text("a python object", "a: !!python/object/apply:os.mkdir [witness]\n", ".* not valid YAML"),
        _run_text("an alias of itself", "a: &a [*a]\n", ".* not valid YAML"),
    )
    for case in pair
]

CHECKSUMS = [
    _checksums("null", "null"),
    _checksums("a list", "[]"),
    _checksums("a number", "1"),
    _checksums("empty", "{}"),
    _checksums("cut", '{"common.pt": [1, "a'),
    _checksums("binary", bytes(range(256))),
    _checksums("deeply nested", DEEP),
    _checksums("without a digest", _set("common.pt", to=[1])),
    _checksums("size text", _set("common.pt", 0, to="big")),
    _checksums("size infinite", _set("common.pt", 0, to=float("inf"))),
    _checksums("size negative", _set("common.pt", 0, to=-1)),
    _checksums("digest a number", _set("common.pt", 1, to=7)),
    _checksums("without .metadata", _drop(".metadata")),
    _checksums("a file of another folder", _set("../../config.yaml", to=[1, "a"])),
    _checksums("a name with a zero byte", _set("a\0b", to=[1, "a"])),
    _checksums("a name of 300 characters", _set("x" * 300, to=[1, "a"])),
]


def _pipe(name: str, said: str, **changes: Any) -> Case:
    """It would be waited for."""

    def make(world: World) -> list[Any]:
        world.put("run")
        (world / name).unlink(missing_ok=True)
        os.mkfifo(world / name)
        return world.train(**changes)

    return Case(f"a pipe for {name}", make, said)


NOTES = [
    _pipe("run/checkpoints/rollbacks.json", "rollbacks.json: is no file"),
    _pipe("run/metrics.jsonl", "output_dir: .*metrics.jsonl is no file"),
    _pipe("run/routers.jsonl", "output_dir: .*routers.jsonl is no file"),
    _pipe("run/config.yaml", "output_dir: .*config.yaml is no file"),
    _notes("empty", ""),
    _notes("a list", "[]"),
    _notes("a number", "512"),
    _notes("binary", bytes(range(256))),
    _notes("deeply nested", DEEP),
    _notes("a note that is a list", {"1024": []}),
    _notes("a note that is a number", {"1024": 3}),
    _notes("a note without data", {"1024": {"guard": {}}}),
    _notes("a note with other tokens", {"1024": {"tokens": 512}}),
    _notes("a note with data of text", {"1024": {"data": "x", "guard": {}}}),
    _notes("a note of another place", {"1024": {"data": LEDGER, "guard": None}}),
    _notes("a note of half a ledger", {"1024": {"data": {"blend": {}}, "guard": {}}}),
]


def _own_phase(world: World) -> list[Any]:
    world.put("run")
    return world.train(start_from=str(world / NEWEST), phase=2)


def _renamed(world: World) -> list[Any]:
    world.put("run")
    shutil.copytree(world.checkpoint, world.checkpoint.with_name("tokens_1280"))
    return world.train()


def _never(world: World) -> list[Any]:
    world.put("run")
    return world.train(checkpoint__resume="never")


def _only(path: str, content: bytes | None) -> Callable[[World], list[Any]]:
    """Something that has a checkpoint's name, and no checkpoint."""

    def make(world: World) -> list[Any]:
        world.write(path, content) if content is not None else (world / path).mkdir(parents=True)
        return world.train()

    return make


def _link_to_nothing(world: World) -> list[Any]:
    (world / "run/checkpoints").mkdir(parents=True)
    os.symlink("nowhere", world / OLDER)
    return world.train()


PLACES = [
    Case("a copy under a later name", _renamed, "tokens_1280: .*1024 tokens"),
    Case("resume: never", _never, "checkpoint.resume: never, but .*tokens_1024 exists"),
    Case(
        "phase of a run that has gone on",
        _own_phase,
        "did not begin at another run's checkpoint: choose another output_dir",
    ),
    Case(
        "a file with its name",
        _only(OLDER, b"x"),
        "tokens_512.damaged: is damaged, and no whole",
        OLDER_ASIDE,
        warns=True,
    ),
    Case(
        "an empty folder with its name",
        _only(OLDER, None),
        "tokens_512.damaged: is damaged, and no whole",
        OLDER_ASIDE,
        warns=True,
    ),
    Case(
        "a link to nothing with its name",
        _link_to_nothing,
        "tokens_512.damaged: is damaged, and no whole",
        OLDER_ASIDE,
        warns=True,
    ),
    Case(
        "one that was set aside before",
        _only(f"{OLDER}.damaged/x", b""),
        "tokens_512.damaged: is damaged, and no whole checkpoint is left",
    ),
]

SPOILT = [_damaged_source(file, how) for file in FILES for how in HOW]
ONLY = [
    _damaged_only(file, how)
    for file, how in (
        (".metadata", "flipped"),
        ("__0_0.distcp", "flipped"),
        ("__0_0.distcp", "cut"),
        ("common.pt", "missing"),
        ("metadata.json", "empty"),
        ("run.yaml", "a folder"),
        ("progress.json", "longer"),
        ("progress.json", "missing"),
        ("checksums.json", "cut"),
    )
]

CASES = [*SPOILT, *ONLY, *PROGRESS, *OWN_PROGRESS, *RUNS, *CHECKSUMS, *NOTES, *cases_start_from.CASES, *PLACES]
