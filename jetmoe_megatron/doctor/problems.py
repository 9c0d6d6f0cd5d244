"""What `jetmoe doctor` says about one machine: what is wrong, slow or unsure, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_tools.printing import printable


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        kind: `wrong` is known not to work, and alone decides the exit status; `slow` works; of what is `unsure`,
            nobody here knows whether it works.
        what: is the matter.
        why: it matters.
        mend: a command to type, or what else to do.
    """

    kind: Literal["wrong", "slow", "unsure"]
    what: str
    why: str
    mend: str

    def __str__(self) -> str:
        return printable(f"{self.kind}: {self.what}: {self.why}" if self.why else f"{self.kind}: {self.what}")
