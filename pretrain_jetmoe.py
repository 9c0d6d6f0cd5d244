"""Pretrain JetMoE: scripts/torchrun_local.sh NPROC RUN.yaml [section.key=value ...]

Run the same command again to resume.
"""

from __future__ import annotations

from data_tools.interrupts import end_without_traceback

end_without_traceback()

import argparse
import os
import signal
import sys
from typing import NoReturn

from data_tools.errors import InputError
from data_tools.printing import Parser, spell_what_the_terminal_lacks
from jetmoe_megatron.config import load_run
from jetmoe_megatron.config.describe import describe
from jetmoe_megatron.config.hardware import find_hardware
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.launch.worker import refuse_to_start
from jetmoe_megatron.resume.start_from import apply_start_from
from jetmoe_megatron.runtime.output import outlast_readers
from jetmoe_megatron.stopping import FIRST_OF_SIGNALS, ExitStatus


def main() -> int:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    started = False
    spell_what_the_terminal_lacks()
    outlast_readers()
    try:
        arguments = parse_arguments()
        hardware = find_hardware(arguments.hardware) if arguments.hardware else None
        run = apply_start_from(load_run(arguments.run, arguments.overrides))
        if run.logging.wandb == "off" or rank != 0:
            # Megatron-Core imports wandb if it is installed (timers.py). Each import makes two temporary folders,
            # which a killed rank leaves behind.
            sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]
        if run.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a GPU: in the checks
        layout = resolve_layout(run, arguments.world or world)
        if rank == 0:
            print(describe(run, layout), flush=True)
        if layout.tensor > 1 and not run.parallel.overlap_moe_expert_parallel_comm:
            # With one hardware queue, a collective starts before the matmul that it overlaps with, in the order of
            # issue (tensor_parallel/layers.py, `LinearWithGradAccumulationAndAsyncCommunication`). The variable is read
            # when the GPU is first used: in the checks. The overlap of the experts' exchange has its own streams, which
            # need their own queues.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

        from jetmoe_megatron.runtime.promised_gpus import check_device
        from jetmoe_megatron.training.preflight import check_run_can_start

        if arguments.world is None:  # else the plan is for another machine
            check_device(run.device)
        check_run_can_start(run, layout, rank)
        if arguments.dry_run:
            from jetmoe_megatron.dry_run.dry_run import dry_run_of_all_ranks

            dry_run_of_all_ranks(run, layout, hardware, elsewhere=arguments.world is not None)
            return 0

        from jetmoe_megatron.training.ranks.process_groups import parallel_groups

        with parallel_groups(run, layout):
            from jetmoe_megatron.training.loop import train

            started = True
            return train(run, layout)
    except (InputError, OSError) as error:
        if started and isinstance(error, OSError):
            raise
        return refuse_to_start(error, started)
    except KeyboardInterrupt:  # before training listens for it: there is nothing to save
        return FIRST_OF_SIGNALS + signal.SIGINT


class _RankParser(Parser):
    """All ranks find the same error, which `refuse_to_start` prints once."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    statuses = "\n".join(f"  {int(status):>2} {status.meaning}" for status in ExitStatus)
    parser: argparse.ArgumentParser = _RankParser(
        description=__doc__,
        epilog=f"exit status (docs/stopping.md):\n{statuses}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="change a setting of the run file"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything that a start reads, print the plan, change nothing"
    )
    parser.add_argument("--world", type=int, metavar="N", help="with --dry-run: plan for N ranks on other machines")
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        help="with --dry-run: does it fit? a100, h100, h200 or b200, or a YAML file; default: this machine",
    )
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = build_parser()
    arguments = parser.parse_intermixed_args()
    for name in ("world", "hardware"):
        if getattr(arguments, name) is not None and not arguments.dry_run:
            parser.error(f"--{name} goes with --dry-run")
    if arguments.world is not None and arguments.world < 1:
        parser.error(f"--world: must be 1 or more, not {arguments.world}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
