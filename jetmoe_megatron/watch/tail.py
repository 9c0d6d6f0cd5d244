"""The lines of a file that a run appends to, each read once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.progress import OnProgress
from jetmoe_megatron.monitor.jsonl import lines_from
from jetmoe_megatron.report.lines import Line, is_usable


class TakenBack(Exception):
    """Lines that were read are no longer in the file: the run goes on from an earlier step."""


class Tail:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._begin, self._end, self._last = 0, 0, 0, ""  # of the last line that was read
        self._step = -1

    def lines(self, progress: OnProgress) -> Iterator[Line]:
        """As `report.lines.steps_of`, of what was written since the last call. Half a line is left for the next call.

        progress: gets the bytes of the file, read and in all.

        Raises:
            TakenBack: begin again, with a new object.
            InputError: the file cannot be read.
        """
        if not self._path.is_file():
            return
        status = self._path.stat()
        if self._end and (status.st_ino != self._inode or status.st_size < self._end):
            raise TakenBack
        self._inode = status.st_ino
        known, begin = self._step, self._begin
        for end, line in lines_from(self._path, begin):
            if begin < self._end:  # the last line that was read, to see that it is still there
                if (end, repr(line)) != (self._end, self._last):
                    raise TakenBack
            elif line is not None and is_usable(line):
                if line["step"] <= known:
                    raise TakenBack
                self._begin, self._end, self._last = begin, end, repr(line)
                if line["step"] > self._step:
                    self._step = line["step"]
                    yield line
                progress(end, status.st_size)
            begin = end
