"""The `jetmoe` command: one function per subcommand. Training has its own entry, `pretrain_jetmoe.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import data_tools.cli
from data_tools.cli import NOTHING_WRITTEN
from data_tools.errors import InputError, one_line
from data_tools.printing import say
from jetmoe_megatron.errors import EXIT_BAD_INPUT, UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jetmoe", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_data(data_tools.cli.add_parser(commands))
    _add_convert(commands)
    _add_report(commands)
    arguments, more = parser.parse_known_args(argv)
    if more and not (hasattr(arguments, "overrides") and all("=" in a and a[0] != "-" for a in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # argparse takes those before an option alone
        arguments.overrides += more
    try:
        return data_tools.cli.run(arguments)
    except (InputError, OSError) as error:
        say(f"error: {one_line(error)}", sys.stderr)
        return EXIT_BAD_INPUT


def _add_data(commands: argparse._SubParsersAction) -> None:
    """The data commands that read a run file."""
    mix = commands.add_parser(
        "mix",
        help="what a run will read of each data set",
        epilog="example: jetmoe data mix configs/quickstart/run.yaml --plot mixture.png",
    )
    mix.add_argument("--plot", type=Path, metavar="FILE", help="draw the mixture too (.png, .svg or .pdf)")
    mix.set_defaults(run=_data_mix, stopped=NOTHING_WRITTEN)
    prepare = commands.add_parser(
        "prepare",
        help="build all indices of a run before it starts",
        epilog="example: jetmoe data prepare configs/quickstart/run.yaml",
    )
    prepare.set_defaults(
        run=_data_prepare, stopped="the indices that were built are kept; run the same command again to continue"
    )
    for parser in (mix, prepare):
        parser.add_argument("run_file", metavar="RUN.yaml")
        parser.add_argument(
            "overrides", metavar="section.key=value", nargs="*", help="change a setting of the run file"
        )


def _data_mix(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.config import load_run
    from jetmoe_megatron.config.run_folder import RunFolder
    from jetmoe_megatron.data.plan import draw, plan, table, warnings
    from jetmoe_megatron.training.branch import branch

    run = branch(load_run(arguments.run_file, arguments.overrides))
    rows = plan(run, RunFolder(run).data_cache)
    print(table(rows))
    for line in warnings(run, rows):
        say(line)
    if arguments.plot:
        draw(run, rows, arguments.plot)
        say(f"drawn: {arguments.plot}")
    return 0


def _data_prepare(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.config import load_run
    from jetmoe_megatron.config.run_folder import RunFolder
    from jetmoe_megatron.data.checks import check_data
    from jetmoe_megatron.training.branch import branch

    run = branch(load_run(arguments.run_file, arguments.overrides))
    check_data(run, thorough=True)
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.prepare import prepare
    from jetmoe_megatron.training.start import find_start

    folder = RunFolder(run)
    prepare(run, IndexCache(folder.data_cache, report=say), find_start(run).ledger.began)
    say(f"{folder.data_cache}: all indices of {run.name} are there")
    return 0


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser("convert", help="between checkpoints and Hugging Face folders, and their comparison")
    directions = convert.add_subparsers(metavar="COMMAND", required=True)
    a_checkpoint = "a checkpoint, or a run folder, which means its newest one"

    to_hf = directions.add_parser(
        "to-hf",
        help="a checkpoint to a Hugging Face folder",
        epilog="example: jetmoe convert to-hf runs/quickstart/checkpoints/tokens_2048000 my_model",
    )
    to_hf.add_argument("checkpoint", type=Path, help=a_checkpoint)
    to_hf.add_argument("out", type=Path, help="the folder to write")
    to_hf.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: as stored")
    to_hf.add_argument("--tokenizer", type=Path, help="a tokenizer folder to copy; default: the checkpoint's")
    to_hf.set_defaults(run=_convert_to_hf, stopped=NOTHING_WRITTEN)

    from_hf = directions.add_parser(
        "from-hf",
        help="a Hugging Face folder to a checkpoint that any layout can start from",
        epilog="example: jetmoe convert from-hf jetmoe-8b checkpoints/jetmoe-8b",
    )
    from_hf.add_argument("folder", type=Path, help="with config.json and safetensors")
    from_hf.add_argument("out", type=Path, help="the checkpoint to write")
    from_hf.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: as stored")
    from_hf.set_defaults(run=_convert_from_hf, stopped=NOTHING_WRITTEN)

    verify = directions.add_parser(
        "verify",
        help="compare two models; exit status 1 if they differ",
        epilog="example: jetmoe convert verify runs/quickstart runs/quickstart/hf --logits",
    )
    for name in ("a", "b"):
        verify.add_argument(name, type=Path, help=f"a Hugging Face folder, {a_checkpoint}")
    verify.add_argument("--logits", action="store_true", help="compare logits, in fp32 through transformers")
    verify.add_argument("--tokens", help="the sequence to compare logits on, as 1,2,3; default: random ones")
    verify.add_argument("--tolerance", type=float, help="largest difference; default: 0, and 1e-5 for logits")
    verify.set_defaults(run=_convert_verify, stopped=NOTHING_WRITTEN)


def _convert_to_hf(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.convert.to_hf import convert_to_hf

    checkpoint = _checkpoint(arguments.checkpoint)
    with _progress_bar() as progress:
        convert_to_hf(checkpoint, arguments.out, arguments.dtype, arguments.tokenizer, progress=progress)
    say(f"{checkpoint} -> {arguments.out}")
    return 0


def _convert_from_hf(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.convert.from_hf import convert_from_hf

    with _progress_bar() as progress:
        convert_from_hf(arguments.folder, arguments.out, arguments.dtype, progress)
    say(f"{arguments.folder} -> {arguments.out}")
    return 0


def _convert_verify(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.convert.verify import compare_logits, compare_tensors

    a, b = _checkpoint(arguments.a), _checkpoint(arguments.b)
    if arguments.logits or arguments.tokens is not None:
        comparison = compare_logits(a, b, _token_ids(arguments.tokens))
        tolerance = 1e-5
    else:
        with _progress_bar() as progress:
            comparison = compare_tensors(a, b, progress)
        tolerance = 0.0
    say(comparison)
    return 0 if comparison.within(tolerance if arguments.tolerance is None else arguments.tolerance) else 1


def _checkpoint(path: Path) -> Path:
    """The newest whole checkpoint of a run folder; anything else as it is."""
    from jetmoe_megatron.checkpoint.integrity import newest_whole_of

    checkpoint, damage = newest_whole_of(path)
    if damage:
        say(f"warning: {damage}", sys.stderr)
    return checkpoint


def _token_ids(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--tokens: write ids as 1,2,3, not {text!r}") from None


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """On a terminal only."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser(
        "report", help="what a run did, in a table", epilog="example: jetmoe report runs/quickstart"
    )
    report.add_argument("run_folder", type=Path)
    report.set_defaults(run=_report, stopped=NOTHING_WRITTEN)


def _report(arguments: argparse.Namespace) -> int:
    from jetmoe_megatron.monitor.report import report

    print(report(arguments.run_folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
