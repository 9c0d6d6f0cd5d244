"""The arguments of `jetmoe doctor` and of `python -m jetmoe_megatron.doctor`, which are the same."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jetmoe_megatron.errors import InputError, UserError
from jetmoe_megatron.launch.worker import refuse_to_start

if TYPE_CHECKING:
    from jetmoe_megatron.config import Run

SUMMARY = "say what is wrong with this machine, or with the ranks of a job"
STOPPED = "nothing was written"

DESCRIPTION = """Say what is installed, what a run would use, and what is known not to work together.
With --ranks, started on each rank of a job: measure every rank and its connections, and name the slow, different or
broken ones. The exit status is 5 if something is wrong; a warning leaves it at 0."""

EXAMPLE = """examples:
  %(prog)s
  %(prog)s configs/jetmoe_8b/run.yaml
with --ranks it is started by a launcher, on one node or on many, as training is:
  python -m jetmoe_megatron.launch.elastic --standalone --nproc-per-node 2 \\
    -m jetmoe_megatron.doctor --ranks configs/quickstart/run.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", metavar="RUN.yaml", nargs="?", help="the run file; default: none")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="change a setting of the run file"
    )
    parser.add_argument("--ranks", action="store_true", help="examine all ranks of the job that this process is one of")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="a rank is slow if it is below the median by more than this fraction; default: 0.2",
    )
    parser.add_argument(
        "--disk-bytes",
        type=int,
        metavar="N",
        help="most bytes that a node writes into output_dir; default: 1 GiB, less if its checkpoints are smaller",
    )


# The functions below import what they need, so that `jetmoe --help` loads neither torch nor the schema.


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 if nothing is wrong, otherwise 5; with --ranks, also the status of `refuse_to_start`.

    Raises:
        InputError: without --ranks, if the run file is wrong.
    """
    if not arguments.ranks:
        for option in ("tolerance", "disk_bytes"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option.replace('_', '-')}: goes with --ranks")
        from jetmoe_megatron.doctor.here import examine_here

        return examine_here(_read_run(arguments))
    try:
        return _examine_ranks(arguments)
    except InputError as error:
        return refuse_to_start(error, met=False)


def _examine_ranks(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.config.layout import resolve_layout

    tolerance = 0.2 if arguments.tolerance is None else arguments.tolerance
    disk_bytes = 2**30 if arguments.disk_bytes is None else arguments.disk_bytes
    if not 0 < tolerance <= 1:
        raise UserError(f"--tolerance: must be between 0 and 1, not {tolerance:g}")
    if disk_bytes < 1:
        raise UserError(f"--disk-bytes: must be 1 or more, not {disk_bytes}")
    run = _read_run(arguments)
    layout = resolve_layout(run, int(os.environ.get("WORLD_SIZE", "1"))) if run else None
    # Megatron-Core imports it if it is installed (timers.py), and each import makes two temporary folders.
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]
    from jetmoe_megatron.doctor.ranks import examine_ranks
    from jetmoe_megatron.runtime.output import outlast_readers

    outlast_readers()
    return examine_ranks(run, layout, tolerance, disk_bytes)


def _read_run(arguments: argparse.Namespace) -> Run | None:
    from jetmoe_megatron.config import load_run

    if arguments.run_file is None:
        return None
    if "=" in arguments.run_file and not Path(arguments.run_file).exists():
        raise UserError(f"{arguments.run_file}: name the run file before the settings that it changes")
    run = load_run(arguments.run_file, arguments.overrides)
    if run.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a GPU
    return run
