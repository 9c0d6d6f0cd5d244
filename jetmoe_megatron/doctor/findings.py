"""Something wrong with a rank, as the line that says so."""

from __future__ import annotations

from dataclasses import dataclass

from data_tools.printing import printable


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        who: the rank, its node and its GPU, or several.
        what: is wrong.
        node: that the next start should leave out; empty if it is not clear which, or if leaving it out does not help.
    """

    who: str
    what: str
    node: str = ""

    def __str__(self) -> str:
        return printable(f"sick: {self.who}: {self.what}")
