"""Tables for terminals and Markdown, with aligned columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Nothing without rows. Empty columns are left out."""
    if not rows:
        return
    used = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    cells = [[line[i] for i in used] for line in [titles, *rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(used))]
    first, *rest = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    yield from [first, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rest, ""]
