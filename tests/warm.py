"""Ranks and commands that start in milliseconds: forks of a server process that has imported everything.

A fork runs the `main` of a command with its own arguments, folder, environment and streams, and ends with its exit
status. What only a separate process can show (imports, warnings, the launchers) is tested with one: `command` and
`launched` in `tests/support.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])

MAIN = {"pretrain": "pretrain_jetmoe", "jetmoe": "jetmoe_megatron.cli", "data_tools": "data_tools.__main__"}
_MEMORY = 4 << 30  # bytes that a command may use, so that one that grows without end ends
_GRACE_SECONDS = 10  # from SIGTERM to SIGKILL for the ranks that are left; a launcher has 30
_APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Process(Protocol):
    """What is used of multiprocessing's."""

    pid: int
    exitcode: int | None

    def is_alive(self) -> bool: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def join(self, timeout: float | None = None) -> None: ...


@dataclass(frozen=True)
class Command:
    """
    Attributes:
        arguments: `pretrain RUN.yaml`, `jetmoe ...` or `data_tools ...`.
        env: the whole environment.
        before: called in the fork, before the command.
    """

    arguments: Sequence[object]
    env: dict[str, str]
    cwd: Path
    before: Callable[[], None] | None = None

    def run(self, ranks: int = 1, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """To the end, on so many ranks. When one fails the others are ended; the first failure is the exit status."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            status = wait(self.start(ranks, out, err), timeout)
            texts = [file.read_text(errors="replace") if file.exists() else "" for file in (out, err)]
        return subprocess.CompletedProcess([str(a) for a in self.arguments], status, *texts)

    def to_their_ends(self, ranks: int, timeout: float = 60) -> list[subprocess.CompletedProcess[str]]:
        """Each rank to its own end, as on nodes of their own: nobody ends the others when one fails."""
        with tempfile.TemporaryDirectory() as folder:
            files = [(Path(folder) / f"out{rank}", Path(folder) / f"err{rank}") for rank in range(ranks)]
            own = [{**env, "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": env["RANK"]} for env in rank_environment(ranks)]
            processes = [start(_be, self, out, err, own[rank]) for rank, (out, err) in enumerate(files)]
            deadline = time.monotonic() + timeout
            for process in processes:
                process.join(max(0, deadline - time.monotonic()))
            statuses = [process.exitcode for process in processes]
            end(processes)
            if None in statuses:
                raise TimeoutError(f"after {timeout} s, ranks had ended with {statuses}")
            texts = [[file.read_text(errors="replace") for file in pair] for pair in files]
        arguments = [str(a) for a in self.arguments]
        return [
            subprocess.CompletedProcess(arguments, status or 0, *text)
            for status, text in zip(statuses, texts, strict=True)
        ]

    def start(self, ranks: int, out: Path | Connection, err: Path) -> list[Process]:
        """out, err: files that are appended to; `out` may be the writing end of a pipe."""
        together = rank_environment(ranks) if ranks > 1 else [{}]
        return [start(_be, self, out, err, own) for own in together]

    @contextlib.contextmanager
    def following(self, ranks: int = 1) -> Iterator[Followed]:
        """While it runs, with its stdout to be read."""
        with tempfile.TemporaryDirectory() as folder:
            read, write = CONTEXT.Pipe(duplex=False)
            err = Path(folder) / "err"
            processes = self.start(ranks, write, err)
            write.close()
            try:
                yield Followed(processes, open(read.fileno(), errors="replace", closefd=False), err)
            finally:
                end(processes)
                read.close()


class Followed:
    def __init__(self, processes: list[Process], stdout: IO[str], err: Path) -> None:
        self.processes, self.stdout, self._err = processes, stdout, err

    def wait_for(self, beginning: str) -> str:
        """The next line that begins so."""
        for line in self.stdout:
            if line.startswith(beginning):
                return line
        raise AssertionError(f"the command ended without {beginning!r}: {self._err.read_text()}")

    def send_signal(self, number: int) -> None:
        """To all ranks."""
        for process in self.processes:
            os.kill(process.pid, number)

    def ended(self, timeout: float = 60) -> tuple[int, str, str]:
        """Exit status, the rest of stdout, and stderr."""
        rest = self.stdout.read()
        return wait(self.processes, timeout), rest, self._err.read_text(errors="replace")


def start(target: Callable[..., Any], *arguments: Any) -> Process:
    process: Any = CONTEXT.Process(target=_begin, args=(target, arguments))
    process.start()
    return process


def rank_environment(ranks: int) -> list[dict[str, str]]:
    """What a launcher would set, for each rank."""
    together = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **together} for rank in range(ranks)]


def wait(processes: list[Process], timeout: float) -> int:
    """The first exit status that is not 0. The other processes are then ended, as a launcher does it.

    Raises:
        TimeoutError: they took longer than so many seconds.
    """
    deadline, failed = time.monotonic() + timeout, 0
    try:
        while any(process.is_alive() for process in processes):
            failure = next((process.exitcode for process in processes if process.exitcode), 0)
            if failure and not failed:
                failed, deadline = failure, time.monotonic() + _GRACE_SECONDS
                for process in processes:
                    process.terminate()
            if time.monotonic() > deadline:
                if failed:
                    break
                raise TimeoutError(f"{len(processes)} ranks took longer than {timeout} s")
            time.sleep(0.01)
    finally:
        end(processes)
    return failed or next((process.exitcode for process in processes if process.exitcode), 0)


def end(processes: list[Process]) -> None:
    for process in processes:
        process.kill()
        process.join()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _begin(target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the fork: it ends with the server, and has the signals of a process that a shell has started."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*arguments)


def redirect(out: Path | Connection, err: Path) -> None:
    """This process's streams to where its parent reads them."""
    for descriptor, stream in ((0, Path(os.devnull)), (1, out), (2, err)):
        opened = stream.fileno() if isinstance(stream, Connection) else os.open(stream, _APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened) if isinstance(stream, Path) else stream.close()
    # What the server's know of their files (whether one can be sought in, its encoding) holds no more.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)


def _be(command: Command, out: Path | Connection, err: Path, rank: dict[str, str]) -> NoReturn:
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        redirect(out, err)
        os.environ.clear()
        os.environ.update(command.env, **rank)
        os.chdir(command.cwd)
        tempfile.tempdir = None
        if command.before:
            command.before()
        name, *sys.argv[1:] = map(str, command.arguments)
        sys.argv[0] = name
        status = importlib.import_module(MAIN[name]).main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
