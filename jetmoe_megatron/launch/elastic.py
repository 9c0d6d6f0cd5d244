"""torchrun for workers that stop on a signal and report by their exit status how they ended.

    python -m jetmoe_megatron.launch.elastic <the arguments of torchrun>

torchrun dies of SIGUSR1, kills its workers 30 seconds after a SIGTERM, and exits 1 with a traceback, whatever status
they failed with. This launcher passes SIGTERM, SIGINT, SIGHUP and SIGUSR1 on to the workers and exits with their
status.

Source: torch.distributed.run and torch.distributed.elastic.agent.server, of which the parts used here (`run`,
`_monitor_workers`, `_exit_barrier`) are the same in torch 2.10 to 2.14.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import psutil
import torch.distributed.launcher.api as launcher_api
import torch.distributed.run as torchrun
from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from jetmoe_megatron.stopping import (
    FIRST_OF_SIGNALS,
    LAUNCHER_WAITS_FOR_NODES,
    LAUNCHER_WAITS_FOR_RANKS,
    NODES_MEET,
    STOP_SIGNALS,
    ExitStatus,
)

PROGRAM = "jetmoe_megatron.launch.elastic"

# Starting the workers again at once (--max-restarts) would not help after these.
DECIDED = (ExitStatus.BAD_INPUT, ExitStatus.BAD_STEPS, ExitStatus.RUN_ME_AGAIN)

# torch's log lines for each failed and closed worker would hide the one line that says why.
NOISE = ("failed (exitcode", "Sending process", "Error waiting on exit barrier")


class _SignalRelay:
    """The handler of the stop signals: passes each on to the workers and remembers which ones came."""

    def __init__(self) -> None:
        self.passed_on: set[int] = set()
        self._set_handler(self)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.passed_on.add(signum)
        workers = psutil.Process().children()
        if not workers:  # still waiting for other nodes to join, or for them to finish
            raise SignalException(f"stopped by signal {signum}", sigval=signal.Signals(signum))
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(signum)

    def retire(self) -> None:
        """Nothing is left to stop now, and a late signal must not change the exit status."""
        self._set_handler(signal.SIG_IGN)

    def _set_handler(self, handler: Any) -> None:
        for signum in STOP_SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:  # as it is under nohup
                signal.signal(signum, handler)


class _PatientAgent(LocalElasticAgent):
    """torch's agent of one node, but it lets workers finish that are about to exit 75."""

    def __init__(self, relay: _SignalRelay, met: threading.Event, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._relay, self._met = relay, met

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        try:
            return super().run(role)
        finally:
            self._relay.retire()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._met.set()
        # torch sends SIGTERM to all workers as soon as one has failed, and SIGKILL 30 seconds later.
        deadline = time.monotonic() + LAUNCHER_WAITS_FOR_RANKS
        assert self._pcontext is not None  # the workers have been started
        pids = self._pcontext.pids().values()
        while {_peek_exit_code(pid) for pid in pids} == {ExitStatus.RUN_ME_AGAIN, None} and time.monotonic() < deadline:
            time.sleep(0.1)
        result = super()._monitor_workers(worker_group)
        codes = [failure.exitcode for failure in result.failures.values()]
        if codes and exit_status(codes, self._relay.passed_on) in DECIDED:
            self._remaining_restarts = 0
            # The first node hosts the rendezvous: if its launcher left before the others, they would fail.
            self._exit_barrier_timeout = LAUNCHER_WAITS_FOR_NODES
            self._exit_barrier()
        return result


def _peek_exit_code(pid: int) -> int | None:
    """The exit code of a child (negative: its signal), None while it runs; torch can still collect it afterwards."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # collected, and torch continues only if every collected code is 0
        return 0
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


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
        2 or 3 if any worker exited with it; 75 if all were stopped; otherwise the code of the first worker that was
        not stopped, 128+n for signal n.
    """
    for code in (ExitStatus.BAD_INPUT, ExitStatus.BAD_STEPS):
        if code in exit_codes:
            return code
    culprits = _culprits(exit_codes, passed_on)
    if not culprits:
        return ExitStatus.RUN_ME_AGAIN
    return culprits[0] if culprits[0] > 0 else FIRST_OF_SIGNALS - culprits[0]


def _give_up(met: threading.Event, endpoint: str) -> None:
    """If another program listens at the endpoint, torch waits for its answer without end and ignores signals."""
    if not met.wait(NODES_MEET):
        _say(f"{socket.gethostname()} did not meet the other nodes at {endpoint} in {NODES_MEET / 60:.0f} minutes")
        os._exit(1)


def _say(message: str) -> None:
    print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)


def _report_failures(error: ChildFailedError, passed_on: Collection[int]) -> int:
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    codes = [failure.exitcode for _, failure in failures]
    status = exit_status(codes, passed_on)
    if status not in (*DECIDED, ExitStatus.LOST_RANKS):  # for these, the workers have printed the reason
        code = _culprits(codes, passed_on)[0]
        rank, failure = failures[codes.index(code)]
        how = f"was killed by {failure.signal_name()}" if code < 0 else f"exited with status {code}"
        _say(f"rank {rank} on {socket.gethostname()} {how}")
    return status


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
    parser = torchrun.get_args_parser()
    parser.prog = f"python -m {PROGRAM}"
    args = parser.parse_args(argv)
    ours = {signum.name for signum in STOP_SIGNALS}
    args.log_dir = args.log_dir or os.devnull  # without it, torch leaves an empty temporary folder
    args.signals_to_handle = ",".join(name for name in args.signals_to_handle.split(",") if name.strip() not in ours)

    relay, met = _SignalRelay(), threading.Event()
    # launch_agent has no argument for the agent
    launcher_api.LocalElasticAgent = partial(_PatientAgent, relay, met)  # type: ignore[misc, assignment]
    threading.Thread(target=_give_up, args=(met, args.rdzv_endpoint), daemon=True).start()
    for module in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{module}").addFilter(
            lambda record: not str(record.msg).startswith(NOISE)
        )
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        return _report_failures(error, relay.passed_on)
    except SignalException as error:
        return ExitStatus.RUN_ME_AGAIN if error.sigval in STOP_SIGNALS else FIRST_OF_SIGNALS + error.sigval
    except RendezvousError as error:
        _say(f"the rendezvous at {args.rdzv_endpoint} failed on {socket.gethostname()}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
