"""What a worker reads at a time."""

from dataclasses import dataclass, field

# The number of a line, from 1 (0: the whole file), and what is wrong with it.
Problem = tuple[int, str]

# Approximate size of a batch, and so of the text that a worker holds, unless one document is longer.
BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Batch:
    """Neighbouring texts of a shard.

    lines: how many were read, including broken ones (rows of a table, 1 for a text); problems: what is wrong, with
    line numbers that count from the start of the shard; notes: oddities that do not change the text.
    """

    texts: list[str]
    lines: int
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Documents left out. One problem may stand for many rows, or for a file with an unknown number of rows."""
        return max(self.lines - len(self.texts), len(self.problems))
