"""One rank that SLURM started itself (`tasks: rank` of a site file), with the variables that torchrun would set.

    srun python -m jetmoe_megatron.launch.slurm_rank SCRIPT [ARGUMENT ...]      (or -m MODULE)

MASTER_ADDR and MASTER_PORT come from the job's script. The rank is a process of its own; its parent says how it ended,
also if it was killed.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from jetmoe_megatron.launch.rank_log import log_into_file
from jetmoe_megatron.launch.script import run_script
from jetmoe_megatron.runtime import failed_nodes
from jetmoe_megatron.stopping import FIRST_OF_SIGNALS, STOP_SIGNALS, ExitStatus

_VARIABLES = {  # torchrun's: SLURM's
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
    "GROUP_RANK": "SLURM_NODEID",
}


def main() -> int:
    """Returns the exit status of the rank, 128+N for signal N."""
    if missing := [theirs for theirs in _VARIABLES.values() if theirs not in os.environ]:
        print(f"error: {', '.join(missing)} not set: SLURM starts this, with srun --ntasks-per-node", file=sys.stderr)
        return ExitStatus.BAD_INPUT
    os.environ.update({ours: os.environ[theirs] for ours, theirs in _VARIABLES.items()})
    failed_nodes.came()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until they can be passed on
    if failed_nodes.stop_asked():
        return ExitStatus.RUN_ME_AGAIN
    if rank := os.fork():
        return _watch(rank)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    log_into_file()
    run_script()
    return 0


def _watch(rank: int) -> int:
    """rank: its process."""
    passed_on = set()

    def pass_on(signum: int, frame: FrameType | None) -> None:
        passed_on.add(signum)
        os.kill(rank, signum)

    for signum in STOP_SIGNALS:
        signal.signal(signum, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    os.waitid(os.P_PID, rank, os.WEXITED | os.WNOWAIT)  # its number stays its own until it is asked how it ended
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])
    if -code in passed_on:  # it had no handler yet, hence nothing to save
        return ExitStatus.RUN_ME_AGAIN
    if failed_nodes.is_to_blame(code):
        failed_nodes.record(failed_nodes.this_node(), failed_nodes.how_it_ended(int(os.environ["RANK"]), code))
    return code if code >= 0 else FIRST_OF_SIGNALS - code


if __name__ == "__main__":
    sys.exit(main())
