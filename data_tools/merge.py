"""Join indexed datasets into one."""

from collections.abc import Sequence
from pathlib import Path

from data_tools.errors import InputError
from data_tools.indexed import IndexedWriter, bin_path, open_index, read_index
from data_tools.outputs import check_output
from data_tools.progress import OnProgress, no_progress


def merge(
    prefixes: Sequence[str | Path], out_prefix: str | Path, overwrite: bool = False, progress: OnProgress = no_progress
) -> IndexedWriter:
    """Write the documents of all datasets, in the order given, as Megatron's `add_index` would.

    Every input is checked before anything is written. Returns the writer, which counts documents and tokens.

    progress: gets the bytes of token ids, written and in all.

    Raises:
        InputError: an input is damaged, named twice, or of another dtype than the first; the output cannot be written.
    """
    check_output(out_prefix, prefixes, overwrite)
    _refuse_twice(prefixes)
    dtypes = [read_index(prefix).dtype for prefix in prefixes]
    for prefix, dtype in zip(prefixes, dtypes, strict=True):
        if dtype != dtypes[0]:
            raise InputError(
                f"{prefix} holds {dtype} and {prefixes[0]} {dtypes[0]}; only datasets of one dtype merge: "
                "were they made with the same tokenizer?"
            )
    total = sum(bin_path(prefix).stat().st_size for prefix in prefixes)
    with IndexedWriter(out_prefix, dtypes[0]) as writer:
        for prefix in prefixes:
            # Opened one at a time: each takes file descriptors.
            writer.add_index(open_index(prefix), lambda written: progress(written, total))
    return writer


def _refuse_twice(prefixes: Sequence[str | Path]) -> None:
    seen = set()
    for prefix in prefixes:
        where = bin_path(prefix).resolve()
        if where in seen:
            raise InputError(f"{prefix}: named twice; to read it more often, give it more weight in the mixture")
        seen.add(where)
