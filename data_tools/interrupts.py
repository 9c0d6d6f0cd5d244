"""Ctrl-C before a command listens for it."""

import sys
from types import TracebackType


def end_without_traceback() -> None:
    """From now on a KeyboardInterrupt that nothing catches prints nothing. Python then ends the process by SIGINT: for
    a shell, status 130."""
    before = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)

    sys.excepthook = report
