"""Tokenize text into a Megatron indexed dataset."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from data_tools import shards
from data_tools.encoding import Encoder
from data_tools.engines import EngineError, choose_engine, open_reference
from data_tools.errors import InputError, reading
from data_tools.indexed import idx_path, smallest_dtype
from data_tools.inputs import find_files
from data_tools.outputs import check_output
from data_tools.parallel import ordered_map
from data_tools.partial import Partial, State, Stats
from data_tools.parts import Part, PartIsComplete, agree
from data_tools.printing import say
from data_tools.progress import OnProgress, no_progress

# How many broken lines, and how many notes, are reported one by one; the file lists all broken lines.
_REPORTED = 20
# Seconds of work between two commits, which a killed run may lose. Each commit waits for the disk.
_COMMIT_SECONDS = 1.0

Report = Callable[[str], None]


def report_to_stderr(message: str) -> None:
    """Print one line for a person to read."""
    say(message, sys.stderr)


def tokenize(
    inputs: Iterable[str | Path],
    out_prefix: str | Path,
    tokenizer: str | Path,
    text_key: str = "text",
    workers: int = 1,
    engine: Literal["auto", "tokenizers", "fastokens"] = "auto",
    append_eod: bool = True,
    on_error: Literal["fail", "skip"] = "fail",
    overwrite: bool = False,
    part: Part | None = None,
    report: Report = report_to_stderr,
    progress: OnProgress = no_progress,
) -> Stats:
    """Write the texts of files to `out_prefix`.bin and .idx, in input order.

    The content depends on the inputs and the tokenizer alone, not on the number of workers. Special tokens
    spelled in a text are encoded as plain text, so only `append_eod` ends a document. After a kill, the next call
    with the same arguments continues, and writes the same files as an uninterrupted one.

    inputs: files, folders, patterns; see `find_files`. tokenizer: a Hugging Face folder or a SentencePiece model.
    engine: auto takes the fast one if its ids equal those of `tokenizers`. report: gets one line for each broken
    line that is skipped (the first 20; all are in `out_prefix`.skipped.txt) and for each oddity that is not an error.
    progress: gets the bytes of the inputs, read and in all.
    part: take only this part of the files, and add its name to `out_prefix`; such a
    part may have no documents.

    Raises:
        PartIsComplete: there is nothing left to do for this part.
        InputError: inputs, tokenizer or output cannot be used, or a line is broken and on_error is "fail".
        KeyboardInterrupt: after the finished work was saved; the message says how much that is.
    """
    if on_error not in ("fail", "skip"):
        raise InputError(f"on_error is {on_error!r}; it must be 'fail' or 'skip'")
    if workers < 1:
        raise InputError(f"workers is {workers}; it must be 1 or more")
    files = find_files(inputs)
    reference = open_reference(tokenizer)
    settings: dict[str, Any] = {
        "format": 1,
        "tokenizer": reference.digest,
        "text_key": text_key,
        "engine": engine,
        "append_eod": append_eod,
        "shard_bytes": shards.SHARD_BYTES,
        "inputs": [_identity(path) for path in files],
    }
    dtype = smallest_dtype(reference.vocab_size)
    encoder = Encoder(str(tokenizer), "tokenizers", text_key, append_eod, dtype, on_error == "fail")
    if part:
        mine = part.of(files)
        check_output(out_prefix, [], overwrite=True)  # only its name: a merge writes it
        agree(out_prefix, {**settings, "parts": part.parts})
        files, out_prefix = list(mine), part.prefix(out_prefix)
        settings["inputs"] = [_identity(path) for path in files]
    partial = Partial(out_prefix, dtype, settings)
    if not partial.is_whole():
        if part and idx_path(out_prefix).exists() and not overwrite:
            raise PartIsComplete(f"{out_prefix} is already complete")
        check_output(out_prefix, [], overwrite)
    with _interrupts_say_what_is_kept(partial, files), partial:
        state = partial.resume(overwrite)
        if state is None:
            name, why = choose_engine(tokenizer, engine)
            if why:
                report(f"note: {why}; encoding with tokenizers")
            state = State(engine=name)
        elif state.skipped and on_error == "fail":
            raise InputError(f"{partial.folder}: left out {state.skipped} broken lines; continue with --on-error skip")
        else:
            report(f"note: continuing after the {state.documents} documents in {partial.folder}")
        if not state.whole:
            try:
                state = _append_shards(partial, state, encoder, files, workers, report, progress)
            except EngineError as error:
                if engine != "auto":
                    raise InputError(f"{error}; leave --engine at auto") from error
                report(f"note: {error}; starting again with tokenizers")
                state = _append_shards(partial, State(), encoder, files, workers, report, progress)
        if not (state.documents or part):
            partial.forget()
            raise InputError(f"no documents in the inputs: {state.empty} empty, {state.skipped} broken")
        partial.publish(state)
    return state


@contextmanager
def _interrupts_say_what_is_kept(partial: Partial, files: list[Path]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        state = partial.kept()
        if state is None:
            raise
        number = [str(path) for path in files].index(state.path) + 1
        raise KeyboardInterrupt(
            f"{state.documents} documents are done, up to file {number} of {len(files)}, and kept in {partial.folder}; "
            "run the same command again to continue"
        ) from None


class _Broken(InputError):
    """A broken line that stops the run."""


def _append_shards(
    partial: Partial,
    state: State,
    encoder: Encoder,
    files: list[Path],
    workers: int,
    report: Report,
    progress: OnProgress,
) -> State:
    """Encode all shards after those of a state. Returns the last state."""
    folder = partial.open(state)
    encoder = replace(encoder, engine=state.engine, folder=folder)
    start = committed = time.perf_counter()
    total = sum(map(shards.bytes_in, files))
    seconds, notes = state.seconds, 0
    try:
        todo = islice(enumerate(shards.cut(files)), state.shards, None)
        with closing(ordered_map(encoder, todo, workers)) as parts:
            for part in parts:
                after, problems = partial.append(state, part, folder)
                if problems and encoder.stop_at_problem:
                    raise _Broken(problems[0])
                for problem in problems[: max(0, _REPORTED - state.problems)]:
                    report(f"skipped: {problem}")
                for note in part.notes[: max(0, _REPORTED - notes)]:
                    report(f"note: {note}")
                notes += len(part.notes)
                now = time.perf_counter()
                state = replace(after, seconds=seconds + now - start)
                progress(state.read, total)
                if now - committed >= _COMMIT_SECONDS:
                    partial.commit(state)
                    committed = time.perf_counter()
    except (KeyboardInterrupt, InputError) as error:
        broken = isinstance(error, _Broken)
        if state.shards:
            partial.commit(state)
        if state.shards and isinstance(error, InputError):
            command = "the same command" + (" with --on-error skip" if broken else "")
            report(f"note: {partial.folder} keeps {state.documents} documents; {command} continues from there")
        if broken:
            fix = "fix the file and start from the beginning with --overwrite" if state.shards else "fix it"
            raise InputError(f"{error}; {fix}, or leave such lines out with --on-error skip") from None
        raise
    if notes > _REPORTED:
        report(f"note: {notes - _REPORTED} more such notes")
    if state.problems > _REPORTED:
        report(f"skipped: {state.problems - _REPORTED} more")
    return state


def _identity(path: Path) -> list[str | int]:
    """Path, size and time: they show whether an input is still the same file."""
    with reading(path):
        status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]
