"""torchrun for workers that stop on a signal and report by their exit status how they ended.

    python -m jetmoe_megatron.launch.elastic <the arguments of torchrun>

torchrun dies of SIGUSR1, kills its workers 30 seconds after a SIGTERM, and exits 1 with a traceback, whatever status
they failed with. This launcher passes SIGTERM, SIGINT, SIGHUP and SIGUSR1 on to the workers and exits with their
status, which they leave in files (`worker.py`), as they do with what they find wrong with the run: it prints that once.
"""

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil
import torch.distributed.run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from jetmoe_megatron.launch import worker
from jetmoe_megatron.launch.missing_ranks import missing_ranks
from jetmoe_megatron.launch.worker import begun, ended, said_wrong
from jetmoe_megatron.runtime import failed_nodes
from jetmoe_megatron.runtime.failed_nodes import how_it_ended, is_to_blame, this_node
from jetmoe_megatron.runtime.output import outlast_readers
from jetmoe_megatron.stopping import (
    DECIDED,
    DUMPS,
    FIRST_OF_SIGNALS,
    LAUNCHER_FOLDER,
    LAUNCHER_WAITS_AFTER_BAD_INPUT,
    LAUNCHER_WAITS_FOR_NODES,
    LAUNCHER_WAITS_FOR_RANKS,
    NODES_MEET,
    NODES_OF_RANKS,
    SIGKILL_AFTER_SIGTERM,
    STOP_SIGNALS,
    ExitStatus,
)

PROGRAM = "jetmoe_megatron.launch.elastic"

# torch's log lines for each failed and closed worker would hide the one line that says why.
NOISE = ("failed (exitcode", "Sending process", "Error waiting on exit barrier")
_LOOKS_EVERY = 0.1  # seconds


class _SignalRelay:
    """The handler of the stop signals: passes each on to the workers and remembers which ones came."""

    def __init__(self) -> None:
        self.passed_on: set[int] = set()
        self._set_handler(self)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.passed_on.add(signum)
        if not _workers():  # still waiting for other nodes to join, or for them to finish
            raise SignalException(f"stopped by signal {signum}", sigval=signal.Signals(signum))
        _send(signum)

    def retire(self) -> None:
        """Nothing is left to stop now, and a late signal must not change the exit status."""
        self._set_handler(signal.SIG_IGN)

    def _set_handler(self, handler: Any) -> None:
        for signum in STOP_SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:  # as it is under nohup
                signal.signal(signum, handler)


def _workers() -> list[psutil.Process]:
    """Those that run."""
    running = []
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
    return running


def _send(signum: int) -> None:
    for process in _workers():
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


class _Wrong:
    """Prints what the ranks of this node find wrong with the run, once for all that find the same."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told: list[str] = []
        self._lock = threading.Lock()

    def tell(self) -> None:
        with self._lock:
            for line in said_wrong(self._folder):
                message = line.partition("error: ")[2]
                # Other ranks learn it from the one that found it, with its name in front.
                if not message.endswith(tuple(self._told)):
                    self._told.append(message)
                    print(line, file=sys.stderr, flush=True)


def _watch(folder: Path, endpoint: str, wrong: _Wrong) -> None:
    """In a thread: end what torch would wait for without end."""
    met = time.monotonic() + NODES_MEET
    while not begun(folder):
        # If another program listens at the endpoint, torch waits for its answer and ignores signals.
        if time.monotonic() > met:
            _say(f"{this_node()} did not meet the other nodes at {endpoint} in {NODES_MEET / 60:.0f} minutes")
            _leave(1, folder)
        time.sleep(_LOOKS_EVERY)
    while not (status := _decided(folder)):
        time.sleep(_LOOKS_EVERY)
    wrong.tell()
    bad_input = status == ExitStatus.BAD_INPUT
    if not _all_end(LAUNCHER_WAITS_AFTER_BAD_INPUT if bad_input else LAUNCHER_WAITS_FOR_RANKS):
        _send(signal.SIGTERM)
        if not _all_end(SIGKILL_AFTER_SIGTERM):
            _send(signal.SIGKILL)
    wrong.tell()
    # The first node hosts the rendezvous: torch lets it wait for the others.
    time.sleep(LAUNCHER_WAITS_FOR_NODES)
    _leave(status, folder)


def _decided(folder: Path) -> int:
    """The status of the workers, if one of them has decided it; otherwise 0."""
    statuses = ended(folder).values()
    return next((status for status in DECIDED if status in statuses), 0)


def _all_end(seconds: float) -> bool:
    """Wait for all workers."""
    deadline = time.monotonic() + seconds
    while _workers() and time.monotonic() < deadline:
        time.sleep(_LOOKS_EVERY)
    return not _workers()


def _leave(status: int, folder: Path) -> NoReturn:
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(status)


def _culprits(exit_codes: Sequence[int], passed_on: Collection[int]) -> list[int]:
    """The exit codes that are not explained by 75, by our signals or by torch's."""
    # A worker that dies of a signal passed on to it had no handler yet, hence nothing to save.
    accounted_for = {ExitStatus.RUN_ME_AGAIN, *(-signum for signum in passed_on)}
    if ExitStatus.RUN_ME_AGAIN in exit_codes:
        # A worker exits 75 after all ranks have saved: those that torch had to close afterwards lost nothing.
        accounted_for |= {-signal.SIGTERM, -signal.SIGKILL}
    return [code for code in exit_codes if code not in accounted_for]


def exit_status(exit_codes: Sequence[int], passed_on: Collection[int] = ()) -> int:
    """The exit status of a launcher whose workers failed.

    Args:
        exit_codes: exit codes of the workers that failed, in the order in which they failed; -n for signal n.
        passed_on: the signals that the launcher had passed on to its workers.

    Returns:
        2, 3 or 5 if any worker exited with it; 75 if all were stopped; otherwise the code of the first worker that was
        not stopped, 128+n for signal n.
    """
    for code in (ExitStatus.BAD_INPUT, ExitStatus.BAD_STEPS, ExitStatus.SICK_RANK):
        if code in exit_codes:
            return code
    culprits = _culprits(exit_codes, passed_on)
    if not culprits:
        return ExitStatus.RUN_ME_AGAIN
    return culprits[0] if culprits[0] > 0 else FIRST_OF_SIGNALS - culprits[0]


def _say(message: str) -> None:
    print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)


def _report_failures(error: ChildFailedError, stopped: Sequence[int], passed_on: Collection[int]) -> int:
    """stopped: those statuses in `DECIDED` that workers ended with."""
    in_order = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    failures = [(rank, failure.exitcode) for rank, failure in in_order]
    codes = [code for _, code in failures]
    status = exit_status([*codes, *stopped], passed_on)
    if status not in (*DECIDED, ExitStatus.LOST_RANKS):  # for these, the workers have printed the reason
        code = _culprits([*codes, *stopped], passed_on)[0]
        _say(how_it_ended(*failures[codes.index(code)]))
    if status not in DECIDED:
        culprits = [code for code in _culprits(codes, passed_on) if is_to_blame(code)]
        if own := [failure for failure in failures if failure[1] in culprits]:
            failed_nodes.record(this_node(), how_it_ended(*own[0]))
    return status


def _report_missing_ranks(folder: Path) -> None:
    found = missing_ranks(Path((folder / DUMPS).read_text()))
    for line in found.lines:
        _say(line)
    if found.ranks and (file := folder / NODES_OF_RANKS).exists():
        nodes = json.loads(file.read_text())
        if len(those := {nodes[rank] for rank in found.ranks}) == 1:  # of many, it is not clear which is to blame
            failed_nodes.record(those.pop(), found.lines[0], if_first=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Launch workers as torchrun does and return their exit status.

    Args:
        argv: the arguments of torchrun; those of the process by default.

    Returns:
        0 if every worker exited 0; 75 also for a stop signal while waiting for other nodes; 1 if the nodes did not
        find each other, or lost each other; otherwise as `exit_status`.

    Raises:
        SystemExit: with status 2, after a usage message, if the arguments are wrong.

    Source: torch.distributed.run.main.
    """
    outlast_readers()
    parser = torchrun.get_args_parser()
    parser.prog = f"python -m {PROGRAM}"
    args = parser.parse_args(argv)
    if args.max_restarts and args.nnodes not in ("1", "1:1"):
        parser.error("--max-restarts: on several nodes, start all of them again instead")
    ours = {signum.name for signum in STOP_SIGNALS}
    args.log_dir = args.log_dir or os.devnull  # without it, torch leaves an empty temporary folder
    args.signals_to_handle = ",".join(name for name in args.signals_to_handle.split(",") if name.strip() not in ours)
    script = ["-m", args.training_script] if args.module else [args.training_script]
    args.training_script_args = [*script, *args.training_script_args]
    args.module, args.training_script = True, worker.__name__
    for module in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{module}").addFilter(
            lambda record: not str(record.msg).startswith(NOISE)
        )
    with tempfile.TemporaryDirectory(prefix="jetmoe-launcher-", ignore_cleanup_errors=True) as name:
        os.environ[LAUNCHER_FOLDER] = name
        return _run(args, Path(name))


def _run(args: Any, folder: Path) -> int:
    """folder: for what the workers leave there."""
    failed_nodes.came()
    relay, wrong = _SignalRelay(), _Wrong(folder)
    if failed_nodes.stop_asked():
        return ExitStatus.RUN_ME_AGAIN
    threading.Thread(target=_watch, args=(folder, args.rdzv_endpoint, wrong), daemon=True).start()
    try:
        try:
            torchrun.run(args)
        finally:
            relay.retire()
    except ChildFailedError as error:
        stopped = [status for status in ended(folder).values() if status in DECIDED]
        status = _report_failures(error, stopped, relay.passed_on)
        if status not in DECIDED and (folder / DUMPS).exists():  # on the node of rank 0
            _report_missing_ranks(folder)
        return status
    except SignalException as error:
        if error.sigval not in STOP_SIGNALS:
            return FIRST_OF_SIGNALS + error.sigval
        statuses = ended(folder)
        if not statuses or set(begun(folder)) != statuses.keys():  # it waited for other nodes
            return ExitStatus.RUN_ME_AGAIN
        failed = [status for status in statuses.values() if status]
        return exit_status(failed, relay.passed_on) if failed else ExitStatus.DONE
    except RendezvousError as error:
        if status := _decided(folder):
            return status
        _say(f"the rendezvous at {args.rdzv_endpoint} failed on {this_node()}: {error}")
        return 1
    finally:
        wrong.tell()
    return _decided(folder)


if __name__ == "__main__":
    sys.exit(main())
