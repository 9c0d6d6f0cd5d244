"""A terminal for the tests: what a command writes to it, and what a person then sees."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType


class PseudoTerminal:
    """A context manager. `path`: what to open as the output of a command; `descriptor`: the same, open.

    After the end of the block, `text` has all that was written.
    """

    def __init__(self, columns: int = 80) -> None:
        self.columns, self.text = columns, ""
        self._ours, self.descriptor = os.openpty()
        self.resize(columns)
        self.path = Path(os.ttyname(self.descriptor))

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def __enter__(self) -> PseudoTerminal:
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)
        self._reader.join()
        os.close(self._ours)

    def _read(self) -> None:
        taken = b""
        with suppress(OSError):  # nobody has it open any more
            while block := os.read(self._ours, 1 << 16):
                taken += block
                self.text = taken.decode(errors="replace")

    @property
    def screen(self) -> list[str]:
        """The lines that remain to be seen, the one with the cursor last, without the spaces at their ends."""
        rows: list[list[str]] = [[]]
        column = 0
        for control, character in re.findall(r"(\x1b\[[\d;?]*[A-Za-z])|(.)", self.text, re.DOTALL):
            if character == "\n":
                rows.append([])
            elif character == "\r":
                column = 0
            elif character:
                if column == self.columns:
                    rows.append([])
                    column = 0
                rows[-1] += [" "] * (column + 1 - len(rows[-1]))
                rows[-1][column] = character
                column += 1
            else:
                assert control.endswith("m"), f"not expected: {control!r}"
        return ["".join(row).rstrip() for row in rows]
