"""How a run ends: the signals that stop it, its exit statuses, and how long each layer waits for others.

docs/stopping.md shows them in the order of time, and a test compares that page with this file.
"""

from __future__ import annotations

import signal
from enum import IntEnum


class ExitStatus(IntEnum):
    """Each has what happened, what to do about it, and whether a job comes back by itself after it: it does after any
    other status, too."""

    meaning: str
    advice: str
    comes_back: bool

    def __new__(cls, status: int, meaning: str, advice: str, comes_back: bool) -> ExitStatus:
        member = int.__new__(cls, status)
        member._value_ = status
        member.meaning, member.advice, member.comes_back = meaning, advice, comes_back
        return member

    DONE = 0, "the run is done", "nothing", False
    NOT_SAVED = (
        1,
        "a failure, such as a last checkpoint that could not be written",
        "do what the last lines ask for, such as making room, and run it again",
        True,
    )
    BAD_INPUT = 2, "wrong usage or input", "change what the `error: ` line says", False
    BAD_STEPS = (
        3,
        "the loss guard stopped the run",
        "change the setting or the data that the last line names",
        False,
    )
    LOST_RANKS = (
        4,
        "another rank died, hangs or did not come",
        "look at the rank that the line names, and run it again",
        True,
    )
    SICK_RANK = (
        5,
        "`jetmoe doctor` found a slow, different or broken rank",
        "leave out the node that it names",
        True,
    )
    # EX_TEMPFAIL of sysexits.h
    RUN_ME_AGAIN = 75, "stopped by a signal after saving", "run the same command again", True


# Statuses that one rank decides for all.
DECIDED = (ExitStatus.BAD_INPUT, ExitStatus.BAD_STEPS, ExitStatus.SICK_RANK, ExitStatus.RUN_ME_AGAIN)


def known_status(status: int) -> ExitStatus | None:
    return next((known for known in ExitStatus if known == status), None)


FIRST_OF_SIGNALS = 128  # plus the number of the signal that ended the process at once

# A folder of the launcher, where the ranks of its node leave their exit statuses and what they find wrong
# (`launch/worker.py`), and rank 0 the path of the dumps (`runtime/flight_recorder.py`) and the node of each rank
# (`runtime/meeting.py`).
LAUNCHER_FOLDER = "JETMOE_LAUNCHER_FOLDER"
DUMPS = "dumps"
NODES_OF_RANKS = "nodes"
# What the script of a job names: folders of one start, for a log of each rank (`launch/rank_log.py`) and for the names
# of nodes that failed, the name of this node (`runtime/failed_nodes.py`), and how often it has started again.
RANK_LOGS = "JETMOE_RANK_LOGS"
FAILED_NODES = "JETMOE_FAILED_NODES"
NODE = "JETMOE_NODE"
RESTARTS = "JETMOE_RESTARTS"

# SLURM and the launcher both pass a signal on, so that a process gets one request several times. Within this many
# seconds a repeat counts as the same request; a later one ends the process at once. A keyboard has no such layers.
STOP_SIGNALS = {signal.SIGTERM: 10.0, signal.SIGUSR1: 10.0, signal.SIGHUP: 10.0, signal.SIGINT: 2.0}

# --- who waits for whom, in seconds ---

# The launcher waits for the other ranks of its node to end, once one has exited with RUN_ME_AGAIN.
LAUNCHER_WAITS_FOR_RANKS = 120.0
# The same, once one has exited with BAD_INPUT: what is wrong is wrong for all, or they wait for that one.
LAUNCHER_WAITS_AFTER_BAD_INPUT = 10.0
# The launcher of a node that stopped, or found bad input, waits for the launchers of the other nodes.
LAUNCHER_WAITS_FOR_NODES = 60.0
# torch's launcher waits between the SIGTERM and the SIGKILL that it sends to the ranks of its node after a failure.
SIGKILL_AFTER_SIGTERM = 30.0
# At the start, the launcher waits for the other nodes. torch gives up after 10 minutes, where it can.
NODES_MEET = 900.0
# Under plain torchrun, a rank that has said what is wrong waits for the others of its node, which then keep silent.
OTHERS_FIND_THE_SAME = 2.0
# A rank that refuses to start waits for the rendezvous store, to tell the other ranks.
REFUSAL_IS_TOLD = 5.0
# A rank that has lost the others over gloo waits for them to notice it too, and for the rendezvous store to answer.
LOST_RANKS_ANSWER = 5.0
STORE_ANSWERS = 60.0
# A new start waits for a run that still trains into the same folder; the second holds if SLURM has lost its node.
RUN_LOCK_IS_FREE = 5.0
RUN_LOCK_IS_FREE_AFTER_REQUEUE = 600.0
