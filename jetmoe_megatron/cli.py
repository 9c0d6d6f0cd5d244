"""The `jetmoe` command: one function per subcommand. Training has its own entry, `pretrain_jetmoe.py`."""

from __future__ import annotations

from data_tools.interrupts import end_without_traceback

end_without_traceback()

import argparse
import json
import sys
from pathlib import Path

import data_tools.cli
from data_tools.cli import add_command, add_group
from data_tools.errors import InputError, one_line
from data_tools.printing import Parser, say
from data_tools.progress import above, progress
from jetmoe_megatron import __version__
from jetmoe_megatron.doctor import command as doctor
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.launch import command as launch
from jetmoe_megatron.plan import command as plan
from jetmoe_megatron.stopping import ExitStatus
from jetmoe_megatron.watch import command as watch

_DESCRIPTION = """Plan runs of JetMoE, start them and print how they are doing, explain their run files, prepare their
data, convert their checkpoints, and examine machines."""

_EXAMPLE = """examples:
  %(prog)s config show configs/quickstart/run.yaml
  %(prog)s data tokenize corpus/ --output data/web --tokenizer data/tokenizer
  %(prog)s convert to-hf runs/quickstart my_model
  %(prog)s plan configs/jetmoe_8b/run.yaml --gpus 96 --hardware h100
  %(prog)s launch local configs/quickstart/run.yaml --ranks 2
  %(prog)s status runs/quickstart
  %(prog)s watch runs/quickstart
  %(prog)s report runs/quickstart
  %(prog)s doctor configs/quickstart/run.yaml
each command explains itself: %(prog)s data tokenize --help"""

_MIX = """Show how many tokens and epochs of each data set a run will read in each phase.
A warning names each data set that is read for more epochs than data.warn_epochs."""

_PREPARE = """Build all indices of a run before it starts, on any machine without a GPU.
Without it, training builds indices for up to data.build_limit_tokens tokens."""

_REFERENCE = (
    """Print all keys of a run file, or of a site file, with their types, defaults and meanings, as Markdown tables."""
)

_SHOW = """Print a run as training reads it: with the model and phase files, the changed settings and all defaults.
A comment after each value says where it comes from: the file and the line, an override, or the default. The output is
a run file too. With start_from and phase, training shortens the phase before at its start; that is not shown."""

_SCHEMA = """Print a JSON schema of a run file, or of a model's, a phase's or a site's file.
An editor that uses it completes, explains and checks the file."""

_TO_HF = """Write a checkpoint as a Hugging Face folder, which plain transformers loads with AutoModelForCausalLM.
All files are compared with their checksums first. No GPU is needed, and little memory."""

_FROM_HF = """Write a Hugging Face folder as a checkpoint. A run of any layout can start from it, with start_from.
Its model.yaml is the model that the run file must have. No GPU is needed, and little memory."""

_VERIFY = """Compare two models, tensor by tensor and bit by bit, or by their logits.
The exit status is 0 if they are equal, 1 if they differ by more than the tolerance, and 2 if one cannot be read."""

_REPORT = """Print what a run did: steps, tokens of each data set, losses, speed, and where its results are.
--html writes it as one page with charts, for a browser. Several runs are compared on it. A run writes the page at its
end too."""


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments, more = parser.parse_known_args(argv)
    if more and not (hasattr(arguments, "overrides") and all("=" in a and a[0] != "-" for a in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # argparse itself takes only the overrides before an option
        arguments.overrides += more
    try:
        return data_tools.cli.run(arguments)
    except (InputError, OSError) as error:
        say(f"error: {one_line(error)}", sys.stderr)
        return ExitStatus.BAD_INPUT


def build_parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = Parser(
        prog="jetmoe",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_config(commands)
    _add_data(data_tools.cli.add_parser(commands))
    _add_convert(commands)
    launch.add_commands(commands)
    _add_watch(commands)
    _add_report(commands)
    _add_doctor(commands)
    _add_plan(commands)
    return parser


def _add_config(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    config = add_group(
        commands,
        "config",
        "explain run files",
        "Explain what a run file may contain, and what a given run file means.",
        "example:\n  %(prog)s show configs/quickstart/run.yaml",
    )
    keys = add_command(
        config, "reference", "print all keys of a run file", "example:\n  %(prog)s", _config_reference, _REFERENCE
    )
    keys.add_argument("kind", choices=("run", "site"), nargs="?", default="run", help="the kind of file; default: run")
    show = add_command(
        config,
        "show",
        "print a run, and where each value comes from",
        "example:\n  %(prog)s configs/quickstart/run.yaml optimizer.max_lr=5e-3",
        _config_show,
        _SHOW,
    )
    launch.add_run_file(show)
    schema = add_command(
        config,
        "schema",
        "print a JSON schema for editors",
        "example:\n  %(prog)s phase",
        _config_schema,
        _SCHEMA,
    )
    schema.add_argument(
        "kind",
        choices=("run", "model", "phase", "site", "hardware"),
        nargs="?",
        default="run",
        help="the kind of file; default: run",
    )


def _config_reference(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.config.reference import reference

    print(reference(arguments.kind), end="")
    return 0


def _config_show(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.config.origin import show

    print(show(arguments.run_file, arguments.overrides), end="")
    return 0


def _config_schema(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.config.json_schema import editor_schema

    print(json.dumps(editor_schema(arguments.kind), indent=2))
    return 0


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The data commands that read a run file."""
    mix = add_command(
        commands,
        "mix",
        "show what a run will read of each data set",
        "example:\n  %(prog)s configs/quickstart/run.yaml --plot mixture.png",
        _data_mix,
        _MIX,
    )
    mix.add_argument("--plot", type=Path, metavar="FILE", help="draw the mixture too (.png, .svg or .pdf)")
    prepare = add_command(
        commands,
        "prepare",
        "build all indices of a run before it starts",
        "example:\n  %(prog)s configs/quickstart/run.yaml",
        _data_prepare,
        _PREPARE,
        stopped="the indices that were built are kept; run the same command again to continue",
    )
    launch.add_run_file(mix)
    launch.add_run_file(prepare)


def _data_mix(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.config import load_run
    from jetmoe_megatron.config.run_folder import data_cache
    from jetmoe_megatron.data.mixture_plot import draw
    from jetmoe_megatron.data.mixture_report import shares, table, warnings
    from jetmoe_megatron.resume.start_from import apply_start_from

    run = apply_start_from(load_run(arguments.run_file, arguments.overrides))
    rows = shares(run, data_cache(run))
    print(table(rows))
    for line in warnings(run, rows):
        say(line)
    if arguments.plot:
        draw(run, rows, arguments.plot)
        say(f"drawn: {arguments.plot}")
    return 0


def _data_prepare(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.config import load_run
    from jetmoe_megatron.config.run_folder import data_cache
    from jetmoe_megatron.data.checks import check_data
    from jetmoe_megatron.resume.start_from import apply_start_from

    run = apply_start_from(load_run(arguments.run_file, arguments.overrides))
    check_data(run, thorough=True)
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.prepare import prepare
    from jetmoe_megatron.resume.start_point import find_start_point

    prepare(run, IndexCache(data_cache(run), report=above), find_start_point(run).ledger.began)
    say(f"{data_cache(run)}: all indices of {run.name} are there")
    return 0


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    directions = add_group(
        commands,
        "convert",
        "convert between checkpoints and Hugging Face folders, and compare models",
        "Convert between the checkpoints of a run and Hugging Face folders, and compare models.",
        "example:\n  %(prog)s to-hf runs/quickstart my_model",
    )
    a_checkpoint = "a checkpoint, or a run folder, which means its newest one"

    to_hf = add_command(
        directions,
        "to-hf",
        "write a checkpoint as a Hugging Face folder",
        "example:\n  %(prog)s runs/quickstart/checkpoints/tokens_2048000 my_model",
        _convert_to_hf,
        _TO_HF,
    )
    to_hf.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=a_checkpoint)
    to_hf.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    to_hf.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="dtype of the tensors; default: as stored")
    to_hf.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="a tokenizer folder to copy; default: the checkpoint's"
    )

    from_hf = add_command(
        directions,
        "from-hf",
        "write a Hugging Face folder as a checkpoint that any layout can start from",
        "example:\n  %(prog)s jetmoe-8b checkpoints/jetmoe-8b",
        _convert_from_hf,
        _FROM_HF,
    )
    from_hf.add_argument("folder", type=Path, metavar="FOLDER", help="a folder with config.json and safetensors")
    from_hf.add_argument("out", type=Path, metavar="OUT", help="the checkpoint to write")
    from_hf.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="dtype of the tensors; default: as stored")

    verify = add_command(
        directions,
        "verify",
        "compare two models; exit status 1 if they differ",
        "example:\n  %(prog)s runs/quickstart runs/quickstart/hf/tokens_2048000 --logits",
        _convert_verify,
        _VERIFY,
    )
    for name in ("a", "b"):
        verify.add_argument(name, type=Path, metavar=name.upper(), help=f"a Hugging Face folder, {a_checkpoint}")
    verify.add_argument("--logits", action="store_true", help="compare logits, in fp32 through transformers")
    verify.add_argument(
        "--tokens", metavar="IDS", help="the sequence to compare logits on, as 1,2,3; default: random ones"
    )
    verify.add_argument(
        "--tolerance", type=float, metavar="X", help="largest difference; default: 0, and 1e-5 for logits"
    )


def _convert_to_hf(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.convert.to_hf import convert_to_hf

    checkpoint = _checkpoint(arguments.checkpoint)
    with progress("converting") as show:
        convert_to_hf(checkpoint, arguments.out, arguments.dtype, arguments.tokenizer, progress=show)
    say(f"{checkpoint} -> {arguments.out}")
    return 0


def _convert_from_hf(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.convert.from_hf import convert_from_hf

    with progress("converting") as show:
        convert_from_hf(arguments.folder, arguments.out, arguments.dtype, show)
    say(f"{arguments.folder} -> {arguments.out}")
    return 0


def _convert_verify(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.convert.verify import compare_logits, compare_tensors

    a, b = _checkpoint(arguments.a), _checkpoint(arguments.b)
    if arguments.logits or arguments.tokens is not None:
        comparison = compare_logits(a, b, _token_ids(arguments.tokens))
        tolerance = 1e-5
    else:
        with progress("comparing") as show:
            comparison = compare_tensors(a, b, show)
        tolerance = 0.0
    say(comparison)
    return 0 if comparison.within(tolerance if arguments.tolerance is None else arguments.tolerance) else 1


def _checkpoint(path: Path) -> Path:
    """The newest whole checkpoint of a run folder. Any other path is returned as it is."""
    from jetmoe_megatron.checkpoint.checksums import newest_whole_of

    checkpoint, damage = newest_whole_of(path)
    if damage:
        say(f"warning: {damage}", sys.stderr)
    return checkpoint


def _token_ids(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--tokens: write ids as 1,2,3, not {text!r}") from None


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = add_command(
        commands,
        "report",
        "print what a run did",
        "example:\n  %(prog)s runs/quickstart --html\n  %(prog)s runs/first runs/second --html comparison.html",
        _report,
        _REPORT,
    )
    report.add_argument("run_folders", type=Path, nargs="+", metavar="RUN_FOLDER", help="output_dir of a run")
    report.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves of one run (.png, .svg or .pdf)")
    report.add_argument(
        "--html",
        type=Path,
        nargs="?",
        const=_IN_THE_FOLDER,
        metavar="FILE",
        help="write a page with charts; default: report.html in the first RUN_FOLDER, which must stand before --html",
    )


_IN_THE_FOLDER = Path()  # what --html is without a name


def _report(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.config.run_folder import RunFolder
    from jetmoe_megatron.report.plot import draw_curves
    from jetmoe_megatron.report.write import print_reports

    folders = arguments.run_folders
    if arguments.plot and len(folders) > 1:
        raise UserError("--plot: draws one run; --html compares several")
    page = RunFolder(folders[0]).report if arguments.html == _IN_THE_FOLDER else arguments.html
    print_reports(folders, page)
    if arguments.plot:
        draw_curves(folders[0], arguments.plot)
        say(f"drawn: {arguments.plot}")
    return 0


def _add_watch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    watch.add_arguments(add_command(commands, "watch", watch.SUMMARY, watch.EXAMPLE, watch.run, watch.DESCRIPTION))


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor.add_arguments(
        add_command(commands, "doctor", doctor.SUMMARY, doctor.EXAMPLE, doctor.run, doctor.DESCRIPTION, doctor.STOPPED)
    )


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan.add_arguments(
        add_command(commands, "plan", plan.SUMMARY, plan.EXAMPLE, plan.run, plan.DESCRIPTION, plan.STOPPED)
    )


if __name__ == "__main__":
    sys.exit(main())
