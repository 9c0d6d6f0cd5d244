"""Tokenize JSON lines into a Megatron indexed dataset."""

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_tools.encoding import Encoder
from data_tools.errors import InputError
from data_tools.indexed import IndexedWriter, bin_path, idx_path, smallest_dtype
from data_tools.inputs import find_files
from data_tools.parallel import ordered_map
from data_tools.reading import Report, read_batches, report_to_stderr
from data_tools.tokenizer import load_tokenizer, vocabulary_size

# Broken lines reported one by one; beyond them only their number is.
_REPORTED = 20


@dataclass
class Stats:
    """What was done so far.

    documents: written; tokens: with ends of documents; bytes: UTF-8 text; empty: documents without text,
    left out; skipped: broken lines and files, left out; seconds: since the start.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    skipped: int = 0
    seconds: float = 0.0


def tokenize(
    inputs: Iterable[str | Path],
    out_prefix: str | Path,
    tokenizer_dir: str | Path,
    text_key: str = "text",
    workers: int = 1,
    append_eod: bool = True,
    on_error: Literal["fail", "skip"] = "fail",
    overwrite: bool = False,
    report: Report = report_to_stderr,
    progress: Callable[[Stats], None] = lambda stats: None,
) -> Stats:
    """Write the texts of JSON lines files to `out_prefix`.bin and .idx, in input order.

    The content depends on the inputs and the tokenizer alone, not on the number of workers. Special tokens
    spelled in a text are encoded as plain text, so only `append_eod` ends a document.

    inputs: files (plain or gzipped), folders, patterns; see `find_files`. report gets one line for each
    broken line that is skipped (the first 20) and for each oddity that is no error; progress gets the
    running stats.

    Raises:
        InputError: inputs, tokenizer or output cannot be used, or a line is broken and on_error is "fail".
    """
    if on_error not in ("fail", "skip"):
        raise InputError(f"on_error is {on_error!r}; it must be 'fail' or 'skip'")
    if workers < 1:
        raise InputError(f"workers is {workers}; it must be 1 or more")
    for path in (bin_path(out_prefix), idx_path(out_prefix)):
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists; choose another output or pass --overwrite")
    files = find_files(inputs)
    dtype = smallest_dtype(vocabulary_size(load_tokenizer(tokenizer_dir)[0]))
    encoder = Encoder(str(tokenizer_dir), text_key, append_eod, dtype)

    start = time.perf_counter()
    stats = Stats()
    with (
        IndexedWriter(out_prefix, dtype) as writer,
        closing(ordered_map(encoder, read_batches(files, report), workers)) as results,
    ):
        for encoded in results:
            if encoded.problems and on_error == "fail":
                raise InputError(f"{encoded.problems[0]}; mend it, or leave such lines out with --on-error skip")
            for problem in encoded.problems[: max(0, _REPORTED - stats.skipped)]:
                report(f"skipped: {problem}")
            writer.add_documents(encoded.ids, encoded.lengths)
            stats.documents += len(encoded.lengths)
            stats.tokens += len(encoded.ids)
            stats.bytes += encoded.text_bytes
            stats.empty += encoded.empty
            stats.skipped += len(encoded.problems)
            stats.seconds = time.perf_counter() - start
            progress(stats)
        if stats.skipped > _REPORTED:
            report(f"skipped: {stats.skipped - _REPORTED} more")
        if not stats.documents:
            raise InputError(f"no documents in the inputs: {stats.empty} empty, {stats.skipped} broken")
    return stats
