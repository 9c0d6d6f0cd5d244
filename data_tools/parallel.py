"""An ordered, bounded map over worker processes."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield function(item) for each item in order, computed by `workers` processes.

    At most 2 * workers + 1 items or results are held at a time. Close the generator to stop early.

    Raises:
        RuntimeError: a worker process died.
        Exception: whatever `function` raised.
    """
    in_flight: deque[Future[Result]] = deque()
    # Spawned, not forked: a fork of a process whose tokenizer has started threads can deadlock.
    executor = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker)
    try:
        for item in items:
            with _interrupts_held():
                in_flight.append(executor.submit(function, item))
            if len(in_flight) > 2 * workers:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process died, perhaps for lack of memory: use fewer workers") from error
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while a process starts. It inherits this, so that only its parent hears a Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent cannot stop its workers; without this they would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
