"""An ordered, bounded map over worker processes."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeVar

from data_tools.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerProcesses:
    """Processes that compute for this one, and end with it. A context manager."""

    def __init__(self, number: int) -> None:
        # Spawned, not forked: a fork of a process whose tokenizer has started threads can deadlock.
        context = get_context("spawn")
        self.number = number
        # Workers hold one end and exit when the other end closes: on purpose, or because this process has died.
        self._lifeline, self._ours = context.Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(number, context, initializer=_start_worker, initargs=(self._lifeline,))

    def __enter__(self) -> "WorkerProcesses":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._ours.close()  # the workers' results are no longer needed
        self._executor.shutdown(cancel_futures=True)
        self._ours.close()
        self._lifeline.close()

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
        """Yield function(item) for each item in order.

        At most 2 * number + 1 items or results are held at a time.

        Raises:
            InputError: a worker process died.
            Exception: whatever `function` raised.
        """
        in_flight: deque[Future[Result]] = deque()
        try:
            for item in items:
                with _interrupts_held():
                    in_flight.append(self._executor.submit(function, item))
                if len(in_flight) > 2 * self.number:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool as error:
            raise InputError("a worker process died, perhaps for lack of memory: use fewer workers") from error


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """`WorkerProcesses.map` with processes of its own. Close the generator to stop early."""
    with WorkerProcesses(workers) as processes:
        yield from processes.map(function, items)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT while a process starts. The process inherits the mask, so that only its parent gets a Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(lifeline: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    os.environ["RAYON_NUM_THREADS"] = "1"
    threading.Thread(target=_exit_at_end_of, args=(lifeline,), daemon=True).start()


def _exit_at_end_of(lifeline: Connection) -> None:
    lifeline.poll(None)
    os._exit(1)
