"""The command `jetmoe data ...` (also `python -m data_tools ...`), and the functions that add and run any command."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.printing import say, spell_what_the_terminal_lacks
from data_tools.progress import above, progress

if TYPE_CHECKING:
    from data_tools.partial import Stats

_TOKENIZE_EXAMPLE = """example:
  %(prog)s shards/*.jsonl.gz --output data/web --tokenizer data/tokenizer --workers 8
writes data/web.bin and data/web.idx, which a phase names as `path: data/web`. Run it again to continue after a kill."""

_TOKENIZER_EXAMPLE = """example:
  %(prog)s corpus/*.jsonl --output data/tokenizer --vocab-size 32000
writes a folder that transformers' AutoTokenizer.from_pretrained loads."""

_MERGE_EXAMPLE = """example:
  %(prog)s data/web-00 data/web-01 --output data/web
joins datasets of one dtype, in this order. A name may end in .idx, so data/web-*.idx means many."""

_SPLIT_EXAMPLE = """example:
  %(prog)s data/web --train data/web-train --held-out data/web-held-out --fraction 0.001
chooses by the token ids of each document alone. Other documents do not matter, and copies are on the same side."""

_INSPECT_EXAMPLE = """examples:
  %(prog)s data/web --check --tokenizer data/tokenizer
  %(prog)s data/web --document -1 --tokenizer data/tokenizer
the first reads the whole dataset and exits with 2 if it is damaged, the second shows the text of the last document."""


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen command. A reader that stops early, such as `| head`, is not a failure.

    On Ctrl-C, one line says what is kept: the text of the KeyboardInterrupt, or `arguments.stopped` if it has none. The
    status is 130.
    """
    spell_what_the_terminal_lacks()
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _lose_output()
        return 0
    except KeyboardInterrupt as interrupt:
        say(f"stopped: {str(interrupt) or arguments.stopped}", sys.stderr)
        return 130


def _lose_output() -> None:
    """Nobody reads stdout any more: send the rest to /dev/null, so that writing it does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    """Add `data` with its commands. Returns the subparsers, to which more commands can be added.

    Each command sets `run`: args -> exit status, may raise InputError; and `stopped`: what is true after a Ctrl-C.
    """
    commands = add_group(
        subparsers,
        "data",
        "turn text into datasets",
        "Turn text into datasets that training reads (Megatron's indexed datasets), and look into them.",
        "example:\n  %(prog)s tokenize corpus/ --output data/web --tokenizer data/tokenizer",
    )
    add_commands(commands)
    return commands


def add_group(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    description: str,
    example: str,
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    """Add a command that has subcommands."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser.add_subparsers(metavar="COMMAND", required=True)


def add_command(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    example: str,
    run: Callable[[argparse.Namespace], int],
    description: str | None = None,
    stopped: str = "nothing was written",
) -> argparse.ArgumentParser:
    """Add a command; the caller adds its arguments.

    summary: for the list of commands, and as a sentence for the command's help if there is no description; run: args
    -> exit status, may raise InputError; stopped: what is true after a Ctrl-C.
    """
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=description or f"{summary[0].upper()}{summary[1:]}.",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, stopped=stopped)
    return parser


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands of `data`."""
    parser = add_command(
        subparsers, "tokenize", "tokenize text into PREFIX.bin and PREFIX.idx", _TOKENIZE_EXAMPLE, _tokenize
    )
    add_tokenize_arguments(parser)
    parser.add_argument(
        "--workers", metavar="N", type=int, default=1, help="processes (1); the output does not depend on it"
    )
    parser.add_argument(
        "--part",
        metavar="K/N",
        help="take only part K of N, a share of the files, into PREFIX.part-K-of-N: for several machines",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing dataset, or an unfinished one with other settings"
    )

    parser = add_command(
        subparsers, "tokenizer", "train a byte-level BPE tokenizer", _TOKENIZER_EXAMPLE, _train_tokenizer
    )
    _add_input(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--vocab-size", metavar="N", type=int, required=True, help="number of ids, 259 or more")
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer in an existing folder")

    parser = add_command(subparsers, "merge", "join datasets into one", _MERGE_EXAMPLE, _merge)
    parser.add_argument("input", metavar="PREFIX", nargs="+", help="datasets, PREFIX.bin and PREFIX.idx each")
    parser.add_argument("--output", metavar="PREFIX", required=True, help="where PREFIX.bin and PREFIX.idx go")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")

    parser = add_command(subparsers, "split", "set documents aside for held-out evaluation", _SPLIT_EXAMPLE, _split)
    parser.add_argument("input", metavar="PREFIX", help="dataset, which stays as it is")
    parser.add_argument("--train", metavar="PREFIX", required=True, help="where most documents go")
    parser.add_argument("--held-out", metavar="PREFIX", required=True, help="where the others go")
    parser.add_argument("--fraction", metavar="F", type=float, required=True, help="held-out share of the documents")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="another seed chooses other documents (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing datasets")

    parser = add_command(subparsers, "inspect", "show what is in a dataset, and check it", _INSPECT_EXAMPLE, _inspect)
    parser.add_argument("input", metavar="PREFIX", help="dataset")
    parser.add_argument("--check", action="store_true", help="read all token ids and report all damage")
    parser.add_argument("--document", metavar="N", type=int, help="show the text of document N, from 0; -1 is the last")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer of the dataset, for --document and --check")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def add_tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    """What determines the dataset that is made of texts."""
    _add_input(parser)
    parser.add_argument("--output", metavar="PREFIX", required=True, help="where PREFIX.bin and PREFIX.idx go")
    parser.add_argument(
        "--tokenizer", metavar="PATH", required=True, help="Hugging Face folder or SentencePiece .model file"
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "fastokens", "tokenizers"),
        default="auto",
        help="library that encodes; auto: fastokens if it gives the same ids as tokenizers",
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="stop at a broken line (fail) or leave it out",
    )


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", nargs="+", help="files (JSONL, Parquet, text), folders or patterns")
    parser.add_argument("--text-key", metavar="KEY", default="text", help="key or column of the text (text)")


# Each function below imports what it needs, so that `jetmoe --help` does not load numpy and tokenizers.


def _tokenize(args: argparse.Namespace) -> int:
    from data_tools.partial import skipped_path
    from data_tools.parts import Part, PartIsComplete
    from data_tools.tokenize import tokenize

    part = Part.parse(args.part) if args.part is not None else None
    prefix = part.prefix(args.output) if part else args.output
    try:
        with progress("tokenizing") as show:
            stats = tokenize(
                args.input,
                args.output,
                args.tokenizer,
                text_key=args.text_key,
                workers=args.workers,
                engine=args.engine,
                on_error=args.on_error,
                overwrite=args.overwrite,
                part=part,
                report=lambda message: above(message, sys.stderr),
                progress=show,
            )
    except PartIsComplete as complete:
        say(complete)
        return 0
    broken = f"{stats.skipped} broken" + (f" (see {skipped_path(prefix)})" if stats.skipped else "")
    say(f"{prefix}: {_describe(stats)}; left out: {stats.empty} empty, {broken}")
    return 0


def _train_tokenizer(args: argparse.Namespace) -> int:
    from data_tools.tokenizer import train_bpe

    start = time.perf_counter()
    with progress("reading texts") as show:
        size = train_bpe(
            args.input, args.vocab_size, args.output, args.text_key, overwrite=args.overwrite, progress=show
        )
    fewer = f" (not {args.vocab_size}: the text has no more pairs to merge)" if size < args.vocab_size else ""
    say(f"{args.output}: vocabulary of {size}{fewer}, {time.perf_counter() - start:.1f} s")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from data_tools.merge import merge

    start = time.perf_counter()
    prefixes = [name.removesuffix(".idx") if Path(name).is_file() else name for name in args.input]
    with progress("merging") as show:
        merged = merge(prefixes, args.output, overwrite=args.overwrite, progress=show)
    seconds = time.perf_counter() - start
    say(f"{args.output}: {merged.documents} documents, {merged.tokens} tokens in {seconds:.1f} s")
    return 0


def _split(args: argparse.Namespace) -> int:
    from data_tools.split import split

    start = time.perf_counter()
    with progress("splitting") as show:
        sides = split(args.input, args.train, args.held_out, args.fraction, args.seed, args.overwrite, progress=show)
    for prefix, side in zip((args.train, args.held_out), sides, strict=True):
        say(f"{prefix}: {side.documents} documents, {side.tokens} tokens")
    print(f"{time.perf_counter() - start:.1f} s")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from data_tools.inspect import inspect

    with progress("checking") as show:
        report = inspect(args.input, args.tokenizer, document=args.document, check=args.check, progress=show)
    if text := json.dumps(report.to_json(), indent=2) if args.json else str(report):
        _show(text)
    for warning in report.warnings:
        say(f"warning: {warning}", sys.stderr)
    for problem in report.problems:
        say(f"error: {problem}", sys.stderr)
    return 2 if report.problems else 0


def _show(text: str) -> None:
    """Print text, and continue if nobody reads it to its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _lose_output()


def _describe(stats: "Stats") -> str:
    megabytes = stats.bytes / 1e6
    return (
        f"{stats.documents} documents, {stats.tokens} tokens, {megabytes:.1f} MB of text "
        f"in {stats.seconds:.1f} s ({megabytes / max(stats.seconds, 1e-9):.1f} MB/s)"
    )
