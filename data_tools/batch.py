"""What a worker reads at a time."""

from dataclasses import dataclass, field

# Number of a line, from 1 (0: the whole file), and what is wrong with it.
Problem = tuple[int, str]

# About the size of a batch, and so of what a worker holds, unless one document is longer.
BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Batch:
    """Neighbouring texts of a shard.

    lines: how many were read, broken ones included (rows of a table, 1 for a text); problems: what is wrong, by
    line from the shard's first; notes: oddities that change no text.
    """

    texts: list[str]
    lines: int
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Documents left out: one problem may be that of many rows, or of a file with nobody knows how many."""
        return max(self.lines - len(self.texts), len(self.problems))
