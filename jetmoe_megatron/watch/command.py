"""The arguments of `jetmoe watch`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from data_tools.progress import is_terminal, progress
from jetmoe_megatron.errors import UserError

SUMMARY = "watch a run under way in a terminal"

EXAMPLE = """examples:
  %(prog)s runs/quickstart
  %(prog)s runs/quickstart --once"""

DESCRIPTION = """Show a run under way: its progress, losses, speed, time by part, alarms, and the load of each expert.
It reads the run folder alone, on any machine that sees it, and changes nothing. Ctrl-C ends it."""

_SHORTEST, _LONGEST = 0.1, 86400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="output_dir of the run")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks; default: 2")
    parser.add_argument("--once", action="store_true", help="print it once and end, as without a terminal")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from jetmoe_megatron.watch.frame import frame
    from jetmoe_megatron.watch.watched import Watched

    if not _SHORTEST <= arguments.every <= _LONGEST:
        raise UserError(f"--every: must be from {_SHORTEST} to {_LONGEST} seconds, not {arguments.every:g}")
    watched = Watched(arguments.run_folder)
    with progress(f"reading {watched.files.metrics.name}") as show:
        watched.look(show)
    console = Console(markup=False, highlight=False, emoji=False)
    if arguments.once or not is_terminal(sys.stdout):
        with console.capture() as captured:
            console.print(frame(watched, console.width))
        print(captured.get(), end="")
        return 0
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(frame(watched, console.width), refresh=True)
            time.sleep(arguments.every)
            watched.look()
