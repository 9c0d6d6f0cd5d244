"""Run as a program. For each step that reaches the disk: makes a dataset, killed at that step, then runs to the end.

    python -m tests.data_tools.crash_driver FOLDER TOKENIZER [--overwrite]

FOLDER holds in.jsonl, the uninterrupted result want.{bin,idx,skipped.txt} and, to be replaced, old.{bin,idx}.
Prints one line of JSON for each number of steps: what stood under the final names after the kill and at the end.
"""

import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from data_tools import partial, shards, tokenize
from data_tools.errors import InputError

KINDS = ("bin", "idx", "skipped.txt")


def main(folder: Path, tokenizer: str, overwrite: bool) -> None:
    shards.SHARD_BYTES, tokenize._COMMIT_SECONDS = 4000, 0
    patch.object(tokenize, "ordered_map", in_this_process).start()
    steps = 0
    while True:
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for kind in KINDS:
            if overwrite and (folder / f"old.{kind}").exists():
                shutil.copy(folder / f"old.{kind}", work / f"out.{kind}")
        killed = in_child(functools.partial(make, folder, tokenizer, overwrite, steps))
        after_kill = what_stands(folder, work)
        status = in_child(lambda: make(folder, tokenizer, overwrite, None))
        left = sorted(path.name for path in work.iterdir())
        print(json.dumps([steps, killed, after_kill, status, what_stands(folder, work), left]), flush=True)
        if killed != -signal.SIGKILL:
            return
        steps += 1


def make(folder: Path, tokenizer: str, overwrite: bool, steps: int | None) -> int:
    if steps is not None:
        kill_after(steps)
    inputs, out = [folder / "in.jsonl"], folder / "work" / "out"
    try:
        tokenize.tokenize(inputs, out, tokenizer, on_error="skip", overwrite=overwrite, report=lambda message: None)
    except InputError:
        return 2
    return 0


def kill_after(steps: int) -> None:
    """Let so many calls happen that change or sync files, and die before the next."""
    left = steps

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **options)

        return wrapped

    for module, name in (
        (os, "fsync"),
        (os, "replace"),
        (os, "unlink"),
        (os, "truncate"),
        (os, "rmdir"),
        (partial, "write_index"),
        (shutil, "copyfileobj"),
    ):
        setattr(module, name, counted(getattr(module, name)))


def in_this_process(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    yield from map(function, items)


def in_child(work: Callable[[], int]) -> int:
    child = os.fork()
    if not child:
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def what_stands(folder: Path, work: Path) -> list[str]:
    """For each final name: absent, old, want, or other."""
    return [
        next(
            (
                name
                for name in ("old", "want")
                if (work / f"out.{kind}").read_bytes() == (folder / f"{name}.{kind}").read_bytes()
            ),
            "other",
        )
        if (work / f"out.{kind}").exists()
        else "absent"
        for kind in KINDS
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], "--overwrite" in sys.argv)
