"""The arguments of `jetmoe plan`."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.atomic import replacing
from data_tools.errors import writing
from data_tools.printing import printable_lines, say
from data_tools.progress import progress
from jetmoe_megatron.errors import UserError

if TYPE_CHECKING:
    from data_tools.parallel import WorkerProcesses
    from jetmoe_megatron.config.hardware import Hardware
    from jetmoe_megatron.config.schema import Run
    from jetmoe_megatron.plan.plan import Plan

SUMMARY = "say what a run needs and takes on some GPUs, before there are any"
STOPPED = "nothing was written"
MOST_GPUS, MOST_IN_A_RANGE = 10**6, 64

DESCRIPTION = """Rehearse a step of the run on this machine, without GPUs and without data: the real model, optimizer
and schedule of each kind of rank, on tensors without numbers. From that: does it fit, what is computed and sent, and,
by the rates and efficiencies of a hardware file, how long it takes and what it costs. Nothing is a measurement."""

EXAMPLE = """examples:
  %(prog)s configs/jetmoe_8b/run.yaml --gpus 96 --hardware h100
  %(prog)s configs/jetmoe_8b/run.yaml --gpus 96 --hardware h100 --search
  %(prog)s configs/quickstart/run.yaml --gpus 1..8 --hardware my_gpu.yaml
  %(prog)s configs/jetmoe_8b/run.yaml parallel.pipeline=1 --gpus 1 --hardware h200 --fit"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="change a setting of the run file"
    )
    parser.add_argument("--gpus", required=True, metavar="N", help="number of GPUs, or 1..8 for a table of all of them")
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
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="take the shares of the peak rates from a step that benchmarks.gpu_step measured",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--search", action="store_true", help="look for the fastest layout that fits")
    what.add_argument("--compare", metavar="OTHER.yaml", help="put another run file beside this one")
    what.add_argument("--fit", action="store_true", help="find the largest models of this shape that fit")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with drawings, for a browser")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")


# The functions below import what they need, so that `jetmoe --help` loads neither torch nor the schema.


def run(arguments: argparse.Namespace) -> int:
    gpus = _numbers(arguments.gpus)
    alone = arguments.search or arguments.fit or arguments.compare
    if len(gpus) > 1 and (arguments.search or arguments.compare or arguments.json or arguments.html):
        raise UserError("--gpus: name one number with --search, --compare, --json and --html")
    for option, file in (("--json", arguments.json), ("--html", arguments.html)):
        if file and alone:
            raise UserError(f"{option}: writes one plan, without --search, --fit and --compare")
    _check_outputs(arguments)
    from jetmoe_megatron.config.hardware import find_hardware

    hardware = find_hardware(arguments.hardware)
    runs = {file: _checked(file, gpus, hardware, arguments) for file in (arguments.run_file, arguments.compare) if file}
    planned = runs[arguments.run_file]
    from jetmoe_megatron.plan.measured import with_measured_shares
    from jetmoe_megatron.plan.world import rehearsing_processes

    with rehearsing_processes() as processes:
        if arguments.measured:
            hardware = with_measured_shares(hardware, arguments.measured, processes)
        if arguments.fit:
            lines = _fit(planned, gpus, hardware, arguments.imbalance, processes)
        elif len(gpus) > 1:
            lines = _range(planned, gpus, hardware, arguments.imbalance, processes)
        elif arguments.search:
            lines = _search(planned, gpus[0], hardware, arguments.imbalance, processes)
        elif arguments.compare:
            lines = _compare(runs, gpus[0], hardware, arguments.imbalance, processes)
        else:
            lines = _plan(planned, gpus[0], hardware, arguments, processes)
        for line in lines:
            print(printable_lines(line), flush=True)
    return 0


def _checked(file: str, gpus: list[int], hardware: Hardware, arguments: argparse.Namespace) -> Run:
    """The run of the file, if it can be planned."""
    from jetmoe_megatron.config import load_run
    from jetmoe_megatron.config.layout import resolve_layout
    from jetmoe_megatron.plan.check import check_can_rehearse, check_size
    from jetmoe_megatron.plan.routing import Routing

    run = load_run(file, arguments.overrides, need_variables=False)
    Routing(run.model.num_experts, run.model.top_k, arguments.imbalance)
    check_can_rehearse(run)
    if not arguments.fit:
        check_size(run, gpus[-1], hardware)
    if len(gpus) == 1 and not (arguments.search or arguments.fit):
        resolve_layout(run, gpus[0])
    return run


def _plan(
    run: Run, gpus: int, hardware: Hardware, arguments: argparse.Namespace, processes: WorkerProcesses
) -> Iterator[str]:
    from jetmoe_megatron.plan.advice import advice, better_by_one_change
    from jetmoe_megatron.plan.page import page
    from jetmoe_megatron.plan.plan import make_plan
    from jetmoe_megatron.plan.text import text

    plan = make_plan(run, gpus, hardware, arguments.imbalance, processes)
    yield text(plan)
    yield from advice(plan, better_by_one_change(plan, processes))
    if arguments.json:
        _write(arguments.json, json.dumps(plan.tree()))
    if arguments.html:
        _write(arguments.html, page(plan))


def _search(run: Run, gpus: int, hardware: Hardware, imbalance: float, processes: WorkerProcesses) -> Iterator[str]:
    from jetmoe_megatron.plan.search import search
    from jetmoe_megatron.plan.search_text import search_text

    with progress("rehearsing", "layouts") as show:
        found = search(run, gpus, hardware, imbalance, processes, show)
    yield from search_text(run, found)


def _fit(
    run: Run, numbers: list[int], hardware: Hardware, imbalance: float, processes: WorkerProcesses
) -> Iterator[str]:
    from jetmoe_megatron.plan.fit import fit_table, largest_models

    for gpus in numbers:
        try:
            with progress("rehearsing", "widths") as show:
                plans = largest_models(run, gpus, hardware, imbalance, processes, show)
            if not plans:
                raise UserError(f"--fit: not even one layer of the narrowest model fits on {gpus} {hardware.gpu}")
        except UserError as error:
            if len(numbers) == 1:
                raise
            yield f"{gpus} GPUs: {error}"
            continue
        yield f"The deepest models of each width that fit on {gpus} {hardware.gpu}, {run.precision}:"
        yield from fit_table(plans)
    yield "All figures are computed from a rehearsal of the program. None is a measurement."


def _compare(
    runs: dict[str, Run], gpus: int, hardware: Hardware, imbalance: float, processes: WorkerProcesses
) -> Iterator[str]:
    from jetmoe_megatron.plan.compare import comparison, difference, settings_that_differ
    from jetmoe_megatron.plan.plan import make_plan

    plans = {name: make_plan(run, gpus, hardware, imbalance, processes) for name, run in runs.items()}
    yield from settings_that_differ(list(runs.items()))
    yield from comparison(plans)
    (first, one), (second, other) = plans.items()
    yield f"{second} beside {first}: {difference(other, one)}"
    yield "All figures are computed from a rehearsal of the program. None is a measurement."


def _range(
    run: Run, numbers: list[int], hardware: Hardware, imbalance: float, processes: WorkerProcesses
) -> Iterator[str]:
    from jetmoe_megatron.plan.compare import comparison
    from jetmoe_megatron.plan.plan import make_plan

    plans: dict[str, Plan | str] = {}
    for gpus in numbers:
        try:
            plans[f"{gpus} GPUs"] = make_plan(run, gpus, hardware, imbalance, processes)
        except UserError as error:
            plans[f"{gpus} GPUs"] = str(error)
    yield from comparison(plans)
    yield "All figures are computed from a rehearsal of the program. None is a measurement."


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Before minutes of work, and before a file of the user's is replaced."""
    inputs = {"RUN.yaml": arguments.run_file, "--hardware": arguments.hardware, "--measured": arguments.measured}
    outputs = {option: file for option, file in (("--json", arguments.json), ("--html", arguments.html)) if file}
    named = {Path(file).absolute(): option for option, file in inputs.items() if file}
    for option, file in outputs.items():
        if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
            raise UserError(f"{option}: {file} is no plain file: name another")
        if not file.parent.is_dir():
            raise UserError(f"{option}: {file.parent} is no folder")
        if file.absolute() in named:
            raise UserError(f"{option}: {file} is what {named[file.absolute()]} names: name another")
        named[file.absolute()] = option


def _write(file: Path, text: str) -> None:
    with writing(file), replacing(file) as stream:
        stream.write(text.encode())
    say(f"written: {file}")


def _numbers(text: str) -> list[int]:
    """Of `96` or `1..8`."""
    match = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", text)
    if not match:
        raise UserError(f"--gpus: write a number, or two as 1..8, not {text!r}")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last <= MOST_GPUS:
        raise UserError(f"--gpus: must be from 1 to {MOST_GPUS:,}, not {text}")
    if last - first >= MOST_IN_A_RANGE:
        raise UserError(f"--gpus: a range may have {MOST_IN_A_RANGE} numbers, not {last - first + 1}")
    return list(range(first, last + 1))
