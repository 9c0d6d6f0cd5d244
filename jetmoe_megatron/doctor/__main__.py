"""For launchers: `-m jetmoe_megatron.doctor --ranks ...`. Other use: `jetmoe doctor`."""

from __future__ import annotations

import argparse
import sys

import data_tools.cli
from data_tools.errors import InputError
from data_tools.printing import Parser, say
from jetmoe_megatron.doctor import command
from jetmoe_megatron.stopping import ExitStatus


def main() -> int:
    parser: argparse.ArgumentParser = Parser(
        prog="python -m jetmoe_megatron.doctor",
        description=command.DESCRIPTION,
        epilog=command.EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.set_defaults(run=command.run, stopped=command.STOPPED)
    try:
        return data_tools.cli.run(parser.parse_intermixed_args())
    except InputError as error:
        say(f"error: {error}", sys.stderr)
        return ExitStatus.BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
