"""`python -m data_tools COMMAND ...`: the commands of `jetmoe data` where only this package is needed."""

import argparse
import sys

from data_tools.cli import add_commands, run
from data_tools.errors import InputError, may_pass, one_line
from data_tools.printing import Parser, say


def main() -> int:
    """Run a command: 0 done, 2 bad usage or input, 130 interrupted."""
    parser: argparse.ArgumentParser = Parser(
        "python -m data_tools",
        description="Turn text into datasets that training reads (Megatron's indexed datasets), and look into them.",
        epilog="example:\n  %(prog)s tokenize corpus/ --output data/web --tokenizer data/tokenizer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_commands(parser.add_subparsers(metavar="COMMAND", required=True))
    args = parser.parse_args()
    try:
        return run(args)
    except (InputError, OSError) as error:
        say(f"error: {one_line(error)}", sys.stderr)
        return 1 if may_pass(error) else 2


if __name__ == "__main__":
    sys.exit(main())
