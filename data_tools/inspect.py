"""What is in an indexed dataset, and whether its files agree with each other and with a tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.engines import open_reference
from data_tools.errors import InputError
from data_tools.indexed import Fault, Index, bin_path, idx_path, open_index, read_index
from data_tools.printing import printable, printable_lines
from data_tools.progress import OnProgress, no_progress

_BAR = 40


@dataclass(frozen=True)
class Summary:
    """The numbers of a dataset. lengths, counts: [distinct], each document length and how many documents have it."""

    documents: int
    sequences: int
    tokens: int
    dtype: str
    bin_bytes: int
    idx_bytes: int
    lengths: np.ndarray
    counts: np.ndarray

    def statistics(self) -> dict[str, float]:
        """Tokens per document: min, median (the lower of two), mean, max; empty if there are no documents."""
        if not self.documents:
            return {}
        median = np.searchsorted(np.cumsum(self.counts), (self.documents - 1) // 2, side="right")
        mean = self.tokens / self.documents
        return {
            "min": int(self.lengths[0]),
            "median": int(self.lengths[median]),
            "mean": mean,
            "max": int(self.lengths[-1]),
        }

    def histogram(self) -> list[tuple[int, int, int]]:
        """(low, high, documents of low to high tokens), from the shortest to the longest: 0, 1, 2-3, 4-7, 8-15, ..."""
        bits = np.array([int(length).bit_length() for length in self.lengths], np.int64)
        counts = np.bincount(bits, self.counts).astype(np.int64).tolist()
        return [(1 << b >> 1, (1 << b) - 1, count) for b, count in enumerate(counts) if b >= bits[0]]


@dataclass(frozen=True)
class Document:
    """One document. number: from 0; sequences: tokens of each; text: decoded, with special tokens."""

    number: int
    sequences: list[int]
    text: str


@dataclass
class Report:
    """What an inspection found. problems: why the dataset cannot be used; warnings: what is merely odd."""

    prefix: str
    summary: Summary | None = None
    document: Document | None = None
    checked: str = ""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For scripts; parts that were not asked for are missing."""
        tree: dict[str, Any] = {"prefix": self.prefix}
        if self.summary:
            tree |= {k: v for k, v in vars(self.summary).items() if k not in ("lengths", "counts")}
            keys = ("low", "high", "documents")
            bins = [dict(zip(keys, entry, strict=True)) for entry in self.summary.histogram()]
            tree["tokens_per_document"] = self.summary.statistics() | {"histogram": bins}
        if self.document:
            tree["document"] = vars(self.document)
        if self.checked or self.problems:
            tree["check"] = {"problems": self.problems, "warnings": self.warnings}
        return tree

    def __str__(self) -> str:
        parts = []
        if self.summary:
            parts.append(_table(self.prefix, self.summary))
        if self.document:
            sizes = " + ".join(map(str, self.document.sequences)) or "0"
            text = printable_lines(self.document.text)
            parts.append(f"document {self.document.number}: {sizes} tokens\n\n{text}")
        if self.checked and not self.problems:
            parts.append(f"check: {self.checked}")
        return "\n\n".join(parts)


def inspect(
    prefix: str | Path,
    tokenizer_dir: str | Path | None = None,
    document: int | None = None,
    check: bool = False,
    progress: OnProgress = no_progress,
) -> Report:
    """Summarize a dataset, or decode one document of it.

    document: its number, from 0; negative numbers count from the end. check: read all token ids too, and report all
    damage; with a tokenizer, also whether its vocabulary has the ids and its end-of-document token ends documents.
    progress: of this reading, gets the bytes of token ids, read and in all.

    Raises:
        InputError: the dataset is damaged (without check); there is no such document; the tokenizer is unusable.
    """
    if document is not None and tokenizer_dir is None:
        raise InputError("decoding a document needs its tokenizer: pass --tokenizer DIR")
    report = Report(str(prefix))
    if check:
        vocabulary = _vocabulary(tokenizer_dir) if tokenizer_dir is not None else None
        try:
            index = open_index(prefix)
        except InputError as error:
            report.problems.append(str(error))
            return report
        report.problems.extend(index.problems())
        if not report.problems:
            _check_tokens(index, vocabulary, report, progress)
        if report.problems:
            return report
    else:
        index = read_index(prefix)
    if document is not None and tokenizer_dir is not None:
        report.document = _decode(index, document, tokenizer_dir)
    else:
        report.summary = _summarize(index)
    return report


def _summarize(index: Index) -> Summary:
    # T tokens make at most sqrt(2 T) distinct lengths: about 1.4 million for a trillion tokens.
    lengths: np.ndarray = np.zeros(0, np.int64)
    counts = lengths
    for new in index.document_lengths():
        lengths, places = np.unique(np.concatenate((lengths, new)), return_inverse=True)
        counts = np.bincount(places, np.concatenate((counts, np.ones_like(new)))).astype(np.int64)
    return Summary(
        index.documents,
        len(index.sequence_lengths),
        index.tokens,
        str(index.dtype),
        bin_path(index.prefix).stat().st_size,
        idx_path(index.prefix).stat().st_size,
        lengths,
        counts,
    )


def _decode(index: Index, number: int, tokenizer_dir: str | Path) -> Document:
    if not -index.documents <= number < index.documents:
        raise InputError(f"{index.prefix}: no document {number}; it has {index.documents}, counted from 0")
    number %= index.documents
    tokenizer = open_reference(tokenizer_dir)
    start, end = index.token_offsets(number, number + 1)
    ids = index.map_tokens()[start:end].tolist()
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise InputError(
            f"{index.prefix}: document {number} holds ids from {min(ids)} to {max(ids)}, the vocabulary of "
            f"{tokenizer_dir} ends at {tokenizer.vocab_size - 1}: was it made with another tokenizer?"
        )
    first, last = index.document_bounds[number : number + 2]
    return Document(number, index.sequence_lengths[first:last].tolist(), tokenizer.decode(ids))


def _vocabulary(tokenizer_dir: str | Path) -> tuple[int, int]:
    tokenizer = open_reference(tokenizer_dir)
    return tokenizer.vocab_size, tokenizer.eod


def _check_tokens(index: Index, vocabulary: tuple[int, int] | None, report: Report, progress: OnProgress) -> None:
    """Read every token id once. vocabulary: its size, and the id that ends documents."""
    data = bin_path(index.prefix)
    size, eod = vocabulary or (2**63, None)
    outside, empty, unended = Fault(), Fault(), Fault()
    tokens = index.map_tokens()
    for first, last in index.document_ranges():
        offsets = index.token_offsets(first, last)
        ids = tokens[offsets[0] : offsets[-1]]
        filled = np.diff(offsets) > 0
        empty.add(first, ~filled)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            outside.add(int(offsets[0]), (ids < 0) | (ids >= size))
        if eod is not None:
            wrong = filled.copy()
            wrong[filled] = tokens[offsets[1:][filled] - 1] != eod
            unended.add(first, wrong)
        progress(int(offsets[-1]) * index.dtype.itemsize, tokens.nbytes)

    if outside.count:
        limit = f"the vocabulary of {size}" if vocabulary else "any vocabulary"
        report.problems.append(
            f"{data}: {outside.count} of {index.tokens} token ids are outside {limit}, the first, "
            f"{tokens[outside.first]}, in document {_document_of(index, outside.first)} (token {outside.first})"
        )
    if unended.count:
        report.warnings.append(
            f"{data}: {unended.count} of {index.documents} documents do not end with the end-of-document token, "
            f"id {eod}, the first is document {unended.first}"
        )
    if empty.count:
        report.warnings.append(
            f"{data}: {empty.count} of {index.documents} documents have no tokens, the first is document {empty.first}"
        )
    within = f"all ids below {size}" if vocabulary else "ids not compared with a vocabulary (pass --tokenizer DIR)"
    report.checked = f"index and data agree; {within}"


def _document_of(index: Index, token: int) -> int:
    sequence = np.searchsorted(index.sequence_offsets, token * index.dtype.itemsize, side="right") - 1
    return int(np.searchsorted(index.document_bounds, sequence, side="right")) - 1


def _table(prefix: str, summary: Summary) -> str:
    rows = [
        ("documents", f"{summary.documents:,}"),
        ("sequences", f"{summary.sequences:,}"),
        ("tokens", f"{summary.tokens:,}"),
        ("dtype", summary.dtype),
        (".bin", f"{summary.bin_bytes:,} bytes"),
        (".idx", f"{summary.idx_bytes:,} bytes"),
    ]
    lines = [printable(prefix), *(f"  {name:<10} {value}" for name, value in rows)]
    if statistics := summary.statistics():
        lines += ["", "tokens per document"]
        lines += [f"  {k:<10} {v:,.1f}" if k == "mean" else f"  {k:<10} {v:,}" for k, v in statistics.items()]
        lines.append("")
        bins = [(f"{low:,}" if low == high else f"{low:,} - {high:,}", n) for low, high, n in summary.histogram()]
        width = max(len(label) for label, _ in bins)
        highest = max(n for _, n in bins)
        lines += [f"  {label:>{width}} {n:>15,} {'#' * -(-n * _BAR // highest)}".rstrip() for label, n in bins]
    return "\n".join(lines)
