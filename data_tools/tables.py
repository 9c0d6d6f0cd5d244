"""Read the texts of a Parquet file, row group by row group. A damaged page costs only the rest of its row group."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools import batch
from data_tools.batch import Batch, Problem
from data_tools.parsing import decode

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile


class BrokenTable(ValueError):
    """Says in a few words why a file cannot be read as Parquet."""


def open_table(path: Path) -> "ParquetFile":
    """
    Raises:
        BrokenTable: its footer, which says where its row groups lie, cannot be read.
        OSError: the file cannot be opened.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with open(path, "rb"):
        pass  # an OSError here is not damage
    try:
        # Without a buffer, a whole row group would be in memory, however large the writer made it.
        table = ParquetFile(path, buffer_size=batch.BATCH_BYTES, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BrokenTable(_in_short(error)) from error
    rows = [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != table.metadata.num_rows:
        raise BrokenTable("its footer contradicts itself")
    return table


def read_row_groups(table: "ParquetFile", groups: range, text_key: str) -> Iterator[Batch]:
    """Yield the texts of a column. Unreadable rows are problems; row numbers count from the first group's start."""
    if wrong := _wrong_table(table, text_key):
        total = sum(table.metadata.row_group(group).num_rows for group in groups)
        yield Batch([], total, [(0, f"{wrong}; {total} rows are left out")])
        return
    first = 1
    for group in groups:
        yield from _row_group(table, group, text_key, first)
        first += table.metadata.row_group(group).num_rows


def _row_group(table: "ParquetFile", group: int, text_key: str, first: int) -> Iterator[Batch]:
    """first: the number of its first row."""
    import pyarrow

    metadata = table.metadata.row_group(group)
    rows, done, reason = metadata.num_rows, 0, "there are fewer rows than the footer says"
    usual = max(1, min(1 << 14, rows * batch.BATCH_BYTES // max(1, metadata.total_byte_size)))
    for batch_rows in (usual, 1):  # the second time row by row, to read all that comes before the damage
        passed = 0
        try:
            for part in table.iter_batches(batch_rows, row_groups=[group], columns=[text_key], use_threads=False):
                new = part.column(0).slice(max(0, done - passed))
                passed += part.num_rows
                if len(new):
                    yield _cells(new, first + done, text_key)
                    done += len(new)
            break
        except (pyarrow.ArrowException, OSError) as error:
            reason = _in_short(error)
    if lost := rows - done:
        where = f"to the end of row group {group + 1} of {table.metadata.num_row_groups}"
        yield Batch([], lost, [(first + done, f"not readable as Parquet ({reason}): {lost} rows, {where}")])


def _in_short(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _wrong_table(table: Any, text_key: str) -> str | None:
    from pyarrow import types

    if not table.metadata.num_rows:
        return "the file is empty"
    schema = table.schema_arrow
    if text_key not in schema.names:
        return f"no column {text_key!r} (columns: {', '.join(map(repr, schema.names))[:200]})"
    if schema.names.count(text_key) > 1:
        return f"{schema.names.count(text_key)} columns have the name {text_key!r}"
    kind = schema.field(text_key).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not any(is_text(kind) for is_text in (types.is_string, types.is_large_string, types.is_binary)):
        return f"the column {text_key!r} is {kind}, not string"
    return None


def _cells(column: Any, first: int, text_key: str) -> Batch:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    texts: list[str] = []
    problems: list[Problem] = []
    for number, cell in enumerate(column.cast(pyarrow.large_binary()).to_pylist(), first):
        try:
            if cell is None:
                raise ValueError(f"the value of {text_key!r} is null, not a string")
            texts.append(decode(cell))
        except UnicodeDecodeError as error:
            problems.append((number, f"not valid UTF-8: {error.reason} at byte {error.start + 1}"))
        except ValueError as error:
            problems.append((number, str(error)))
    return Batch(texts, len(column), problems)
