"""The `jetmoe` command: one function per subcommand. Training has its own entry, `pretrain_jetmoe.py`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import data_tools.cli
from data_tools.errors import InputError
from jetmoe_megatron.errors import EXIT_BAD_INPUT, UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jetmoe", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    data_tools.cli.add_parser(commands)
    _add_convert(commands)
    _add_report(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (UserError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return 130


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser("convert", help="between checkpoints and Hugging Face folders")
    directions = convert.add_subparsers(metavar="DIRECTION", required=True)
    to_hf = directions.add_parser(
        "to-hf",
        help="a checkpoint to a Hugging Face folder",
        epilog="example: jetmoe convert to-hf runs/quickstart/checkpoints/tokens_4915200 runs/quickstart/hf",
    )
    to_hf.add_argument("checkpoint", type=Path, help="a checkpoint, or a run folder, which stands for its newest one")
    to_hf.add_argument("out", type=Path, help="the folder to write")
    to_hf.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: the precision of training")
    to_hf.add_argument("--tokenizer", type=Path, help="a tokenizer folder to copy; default: the run's")
    to_hf.set_defaults(run=_convert_to_hf)


def _convert_to_hf(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.checkpoint.folder import newest
    from jetmoe_megatron.convert.to_hf import convert_to_hf

    checkpoint = newest(arguments.checkpoint / "checkpoints") or arguments.checkpoint
    convert_to_hf(checkpoint, arguments.out, arguments.dtype, arguments.tokenizer)
    print(f"{checkpoint} -> {arguments.out}")
    return 0


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser(
        "report", help="what a run did, in a table", epilog="example: jetmoe report runs/quickstart"
    )
    report.add_argument("run_folder", type=Path)
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.monitor.report import report

    print(report(arguments.run_folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
