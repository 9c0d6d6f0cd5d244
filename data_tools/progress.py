"""Progress of long work on stderr: a bar on a terminal, elsewhere a line now and then. Short work shows nothing."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TextIO

from data_tools.printing import printable, say
from data_tools.units import duration, shown

BAR_AFTER = 1.0  # seconds of work
LINE_EVERY = 30.0  # seconds, where stderr is not a terminal

OnProgress = Callable[[int, int], None]  # how much is done, of how much


def no_progress(done: int, total: int) -> None:
    pass


@contextmanager
def progress(what: str, unit: str = "B", here: bool = True) -> Iterator[OnProgress]:
    """What it yields is called now and then during the work, by one thread at a time. No thread waits in between.

    unit: B for bytes, or a word for what is counted; here: whether to show anything, as on one rank of several.
    """
    if not here:
        yield no_progress
        return
    view = _Bar(what, unit) if is_terminal(sys.stderr) else _Lines(what, unit)
    try:
        yield view.show
    finally:
        view.close()


def above(line: object, file: TextIO | None = None) -> None:
    """`say` a line above the bars that are shown."""
    bars = sys.modules.get("tqdm")  # no bar is shown without it
    with bars.tqdm.external_write_mode(file or sys.stdout) if bars else nullcontext():
        say(line, file)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a line on it can be written over. None: it was closed before Python began."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


class _Bar:
    """Made late: what is written above a bar shows it, however new it is."""

    def __init__(self, what: str, unit: str) -> None:
        self._options: dict[str, Any] = {"desc": printable(what), "unit": unit if unit == "B" else f" {unit}"}
        self._begun = time.monotonic()
        self._bar: Any = None

    def show(self, done: int, total: int) -> None:
        if self._bar is None:
            if time.monotonic() - self._begun < BAR_AFTER:
                return
            from tqdm import tqdm

            options = self._options | {"unit_scale": self._options["unit"] == "B", "initial": done, "total": total}
            # miniters: by default it is learnt, and fast work that becomes slow would stand still.
            self._bar = tqdm(file=sys.stderr, leave=False, dynamic_ncols=True, miniters=1, **options)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Lines:
    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._said = time.monotonic()
        self._first: tuple[int, float] | None = None  # how much was done when

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None or done < self._first[0]:  # it begins, or begins again
            self._first = done, now
        if now - self._said < LINE_EVERY:
            return
        self._said = now
        before, since = self._first
        rate = (done - before) / (now - since) if now > since else 0.0
        pace = f", {self._amount(rate)}/s, {duration((total - done) / rate)} left" if rate else ""
        say(f"{self._what}: {self._amount(done)} of {self._amount(total)}{pace}", sys.stderr)

    def _amount(self, value: float) -> str:
        return shown(value, "B") if self._unit == "B" else f"{value:,.4g} {self._unit}"

    def close(self) -> None:
        pass
