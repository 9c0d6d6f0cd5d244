"""The arguments of `jetmoe plan`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data_tools.atomic import replacing
from data_tools.errors import writing
from data_tools.printing import printable_lines, say
from jetmoe_megatron.errors import UserError

SUMMARY = "say what a run needs and takes on some GPUs, before there are any"
STOPPED = "nothing was written"

DESCRIPTION = """Rehearse a step of the run on this machine, without GPUs and without data: the real model, optimizer
and schedule of each kind of rank, on tensors without numbers. From that: does it fit, what is computed and sent, and,
by the rates and efficiencies of a hardware file, how long it takes and what it costs. Nothing is a measurement."""

EXAMPLE = """examples:
  %(prog)s configs/jetmoe_8b/run.yaml --gpus 96 --hardware h100
  %(prog)s configs/quickstart/run.yaml --gpus 1 --hardware my_gpu.yaml --json plan.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="change a setting of the run file"
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    parser.add_argument(
        "--hardware", required=True, metavar="NAME", help="a100, h100, h200 or b200, or a YAML file with other rates"
    )
    parser.add_argument(
        "--imbalance",
        type=float,
        default=1.0,
        metavar="X",
        help="rows of the fullest expert, divided by the mean; default: 1",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")


# The function below imports what it needs, so that `jetmoe --help` loads neither torch nor the schema.


def run(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.config import load_run
    from jetmoe_megatron.config.hardware import find_hardware

    if arguments.gpus < 1:
        raise UserError(f"--gpus: must be 1 or more, not {arguments.gpus}")
    if not 1 <= arguments.imbalance <= 1000:
        raise UserError(f"--imbalance: must be between 1 and 1000, not {arguments.imbalance:g}")
    hardware = find_hardware(arguments.hardware)
    planned = load_run(arguments.run_file, arguments.overrides)
    from jetmoe_megatron.plan.plan import make_plan
    from jetmoe_megatron.plan.text import text

    plan = make_plan(planned, arguments.gpus, hardware, arguments.imbalance)
    print(printable_lines(text(plan)))
    if arguments.json:
        with writing(arguments.json), replacing(arguments.json) as file:
            file.write(json.dumps(plan.tree()).encode())
        say(f"written: {arguments.json}")
    return 0
