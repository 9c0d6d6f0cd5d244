"""Something wrong with a rank, as the line that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_tools.printing import printable


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        who: the rank, its node and its GPU, or several.
        what: is wrong.
        node: that the next start should leave out; empty if it is not clear which, or if leaving it out does not help.
        kind: `sick` ends a start, with status 5. `warning`: training is right all the same.
    """

    who: str
    what: str
    node: str = ""
    kind: Literal["sick", "warning"] = "sick"

    def __str__(self) -> str:
        return printable(f"{self.kind}: {self.who}: {self.what}")
