"""Prints the tables of runs and writes their page: `jetmoe report`. Training writes the page of its run at its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.atomic import replacing
from data_tools.errors import InputError, one_line, writing
from data_tools.printing import say
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.report.history import History
from jetmoe_megatron.report.page import page
from jetmoe_megatron.report.table import report, shown

_MOST_RUNS = 20  # that share the room of a page; more make it larger


def print_reports(folders: Sequence[Path], file: Path | None) -> None:
    """The table of each run and, if `file` is given, the page of all. Of several runs, bad ones are only warned of.

    Raises:
        InputError, OSError: a single run is bad, or all are, or the page cannot be written.
    """
    runs: list[History] = []
    left_out: list[str] = []
    for number, folder in enumerate(folders):
        try:
            if file is None:
                text = report(folder)
            else:
                run = History(folder, min(len(folders), _MOST_RUNS))
                text = shown(run.summary, folder)
                runs.append(run)
        except (InputError, OSError) as error:
            left_out.append(one_line(error))
            if len(left_out) == len(folders):
                raise
            say(f"warning: left out: {left_out[-1]}", sys.stderr)
            continue
        if len(folders) > 1:
            say(f"{folder}:")
        print(text + "\n" * (number < len(folders) - 1))
    if file is not None:
        write_page(file, runs, left_out)
        say(f"written: {file}")


def write_page(file: Path, runs: Sequence[History], left_out: Sequence[str] = ()) -> None:
    text = page(runs, left_out)
    with writing(file), replacing(file) as stream:
        stream.write(text.encode())


def write_report(folder: Path) -> None:
    """`report.html` of a run folder. A failure is a warning: a report must not end a run."""
    file = RunFolder(folder).report
    try:
        write_page(file, [History(folder)])
    except Exception as error:
        say(f"warning: {file}: not written: {type(error).__name__}: {error}", sys.stderr)
