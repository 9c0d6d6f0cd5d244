"""What the script of a job asks before and after each start of the ranks.

    python -m jetmoe_megatron.launch.job begin START --nodes A,B RUN.yaml [section.key=value ...]
    python -m jetmoe_megatron.launch.job end START --status N --most N [--cancelled | --requeued] RUN.yaml [...]

START names this start, as JOB-NUMBER. `begin` prints the folder of this start. `end` says on stderr what happened and
what follows (`comes_back.py`), and prints `again` or `stop`, and the nodes to leave out.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data_tools.errors import InputError, one_line
from data_tools.printing import Parser, printable, say
from jetmoe_megatron.checkpoint.folder import newest, tokens_of
from jetmoe_megatron.config import load_run
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.errors import may_pass
from jetmoe_megatron.launch.comes_back import Decision, decide
from jetmoe_megatron.launch.starts import Start, add_end, add_start, starts_of
from jetmoe_megatron.runtime.clock import utc_now
from jetmoe_megatron.runtime.failed_nodes import recorded
from jetmoe_megatron.stopping import FIRST_OF_SIGNALS, STOP_SIGNALS, ExitStatus

_STOPPED = [FIRST_OF_SIGNALS + signum for signum in STOP_SIGNALS]


def begin(folder: RunFolder, start: str, nodes: list[str]) -> Path:
    """Returns the folder of this start, for the logs of its ranks and the names of nodes that fail."""
    logs = folder.logs / start
    _failed_nodes(folder, start).mkdir(parents=True, exist_ok=True)
    add_start(folder.starts, Start(start, utc_now(), _tokens(folder), nodes))
    return logs.absolute()


def end(folder: RunFolder, start: str, status: int, cancelled: bool, most: int, requeued: bool = False) -> Decision:
    starts = starts_of(folder.starts, start.rpartition("-")[0])
    if not starts or starts[-1].start != start:
        raise InputError(f"{folder.starts}: {start} is not the last start of its job")
    # A stop may come before all nodes have, and end those that still start.
    stopped = requeued or cancelled or status in (ExitStatus.RUN_ME_AGAIN, *_STOPPED)
    expected = [] if stopped else starts[-1].nodes
    failed, tokens = recorded(_failed_nodes(folder, start), expected), _tokens(folder)
    decision = decide(status, cancelled, tokens, starts, failed, most, requeued)
    values = asdict(decision)
    add_end(folder.starts, start, time=utc_now(), status=status, tokens=tokens, failed_nodes=failed, **values)
    return decision


def _failed_nodes(folder: RunFolder, start: str) -> Path:
    return folder.logs / start / "failed_nodes"


def _tokens(folder: RunFolder) -> int:
    checkpoint = newest(folder.checkpoints)
    return tokens_of(checkpoint) if checkpoint else 0


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = Parser(prog="python -m jetmoe_megatron.launch.job", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (commands.add_parser("begin"), commands.add_parser("end")):
        command.add_argument("start", metavar="START")
        if command.prog.endswith("begin"):
            command.add_argument("--nodes", required=True, type=lambda text: text.split(","))
        else:
            command.add_argument("--status", required=True, type=int)
            ended_by = command.add_mutually_exclusive_group()
            ended_by.add_argument("--cancelled", action="store_true")
            ended_by.add_argument("--requeued", action="store_true", help="by SLURM itself")
            command.add_argument("--most", required=True, type=int)
        command.add_argument("run", metavar="RUN.yaml")
        command.add_argument("overrides", metavar="section.key=value", nargs="*")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        folder = RunFolder.of(load_run(arguments.run, arguments.overrides))
        if arguments.command == "begin":
            print(begin(folder, arguments.start, arguments.nodes))
        else:
            asked = (arguments.status, arguments.cancelled, arguments.most, arguments.requeued)
            decision = end(folder, arguments.start, *asked)
            say(printable(f"{utc_now()} start {arguments.start}: {decision.reason}"), sys.stderr)
            print("again" if decision.again else "stop", ",".join(decision.leave_out))
    except InputError as error:
        say(f"error: {one_line(error)}", sys.stderr)
        return ExitStatus.NOT_SAVED if may_pass(error) else ExitStatus.BAD_INPUT
    except OSError as error:  # which may pass
        say(printable(f"error: {error}"), sys.stderr)
        return ExitStatus.NOT_SAVED
    except KeyboardInterrupt:
        return FIRST_OF_SIGNALS + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
