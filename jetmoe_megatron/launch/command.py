"""The arguments of `jetmoe launch` and `jetmoe status`."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.cli import add_command, add_group, add_tokenize_arguments
from data_tools.printing import say
from jetmoe_megatron.errors import UserError

_LOCAL = """Train on this machine, and start again after a failure as long as checkpoints advance.
Ctrl-C saves and stops. The script and the resolved run file stand in launches/ of the run folder."""

_SLURM = """Submit a run to SLURM, as a job that comes back by itself until the run is done.
The script and the resolved run file stand in launches/ of the run folder; options of sbatch, in the site file."""

_SSH = """Train on the hosts of a site file, from this machine, and start again after a failure.
All hosts must see the repository and output_dir under the same paths. Ctrl-C saves and stops."""

_TOKENIZE = """Submit the tokenizing of text to SLURM: an array of jobs, and a job that merges their parts.
The dataset has the bytes of one machine's. Each job takes whole files, and cpus_per_node cores of the site file. The
script and the output of the jobs stand in PREFIX.tokenize."""

_STATUS = """Print how a run is doing: its state, step, rate, time left, last checkpoint, restarts and last warnings.
It reads the run folder and, where SLURM is, asks for the job. Without a folder, it looks at each one in runs/."""


# The functions below import what they need, so that `jetmoe --help` loads neither torch nor the schema.


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _add_launch(commands)
    _add_status(commands)


def add_run_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="change a setting of the run file"
    )


def _add_launch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    ways = add_group(
        commands,
        "launch",
        "start a run that comes back by itself",
        "Start a run on this machine, on a cluster with SLURM, or on hosts that ssh reaches.",
        "example:\n  %(prog)s slurm configs/jetmoe_8b/run.yaml --site configs/site.yaml --print",
    )
    for way, summary, description in (
        ("local", "train on this machine", _LOCAL),
        ("slurm", "submit a run to SLURM", _SLURM),
        ("ssh", "train on hosts that ssh reaches", _SSH),
    ):
        option = "--ranks 2" if way == "local" else "--site configs/site.yaml"
        example = f"example:\n  %(prog)s configs/quickstart/run.yaml {option}"
        command = add_command(ways, way, summary, example, _launch, description)
        command.set_defaults(way=way)
        command.add_argument("--print", action="store_true", help="only print the scripts")
        if way == "local":
            command.add_argument("--ranks", type=int, metavar="N", help="ranks; default: one for each GPU")
        command.add_argument("--site", type=Path, metavar="FILE", required=way != "local", help="the site file")
        add_run_file(command)
    tokenize = add_command(
        ways,
        "tokenize",
        "tokenize on several nodes of a cluster with SLURM",
        "example:\n  %(prog)s corpus/ --output data/web --tokenizer data/tokenizer --parts 8 --site configs/site.yaml",
        _launch_tokenize,
        _TOKENIZE,
    )
    add_tokenize_arguments(tokenize)
    tokenize.add_argument("--parts", type=int, metavar="N", required=True, help="jobs, each with a part of the files")
    tokenize.add_argument("--site", type=Path, metavar="FILE", required=True, help="the site file")
    tokenize.add_argument("--print", action="store_true", help="only print the script")
    tokenize.add_argument("--overwrite", action="store_true", help="replace an existing dataset")


def _launch(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.config import load_run
    from jetmoe_megatron.config.run_folder import RunFolder
    from jetmoe_megatron.config.site import Site, load_site
    from jetmoe_megatron.launch.launch import check_slurm, scripts, shown, start, submit, write
    from jetmoe_megatron.launch.starts import add_submitted

    site = load_site(arguments.site) if arguments.site else Site(gpus_per_node=0)
    if arguments.way == "local" and not (arguments.site and arguments.ranks is None):
        site = site.model_copy(update={"ranks_per_node": _ranks(arguments.ranks)})
    run = load_run(arguments.run_file, arguments.overrides)
    texts = scripts(run, site, arguments.way)
    if arguments.print:
        print(shown(texts), end="")
        return 0
    if arguments.way == "slurm":
        check_slurm()
    script = write(texts, run)
    if arguments.way != "slurm":
        start(script)
    job = submit(script)
    say(f"job {job}: {script}")
    add_submitted(RunFolder.of(run).starts, job)
    return 0


def _launch_tokenize(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.config.site import load_site
    from jetmoe_megatron.launch.launch import check_slurm
    from jetmoe_megatron.launch.tokenize import Work, check, script, submit_all

    work = Work(
        arguments.input,
        arguments.output,
        arguments.tokenizer,
        arguments.parts,
        ["--text-key", arguments.text_key, "--engine", arguments.engine, "--on-error", arguments.on_error],
        arguments.overwrite,
    )
    site = load_site(arguments.site)
    check(work)
    if arguments.print:
        print(script(work, site), end="")
        return 0
    check_slurm()
    array, merge = submit_all(work, site)
    say(f"job {array}: {work.parts} parts of {work.prefix}; job {merge} merges them; output: {work.folder}")
    return 0


def _ranks(ranks: int | None) -> int:
    """As the user asked, or one for each GPU."""
    if ranks is None:
        import torch

        ranks = torch.cuda.device_count()
        if not ranks:
            raise UserError("--ranks: must be given, as torch sees no GPU")
    if ranks < 1:
        raise UserError(f"--ranks: must be 1 or more, not {ranks}")
    return ranks


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = add_command(
        commands, "status", "print how a run is doing", "example:\n  %(prog)s runs/quickstart", _status, _STATUS
    )
    status.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", nargs="?", help="output_dir of the run")


def _status(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.launch.status import status

    if arguments.run_folder:
        print(status(arguments.run_folder))
        return 0
    files = ("config.yaml", "starts.jsonl")  # one that waits has the second only
    folders = sorted({path.parent for name in files for path in Path("runs").glob(f"*/{name}")})
    if not folders:
        raise UserError("runs: no run folders here; name one")
    print("\n\n".join(f"{folder}\n{status(folder)}" for folder in folders))
    return 0
