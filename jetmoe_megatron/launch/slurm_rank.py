"""One rank that SLURM started itself (`tasks: rank` of a site file), with the variables that torchrun would set.

    srun python -m jetmoe_megatron.launch.slurm_rank SCRIPT [ARGUMENT ...]      (or -m MODULE)

MASTER_ADDR and MASTER_PORT come from the job's script.
"""

from __future__ import annotations

import os

from jetmoe_megatron.launch.rank_log import log_into_file
from jetmoe_megatron.launch.script import run_script
from jetmoe_megatron.runtime import failed_nodes

_VARIABLES = {  # torchrun's: SLURM's
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
    "GROUP_RANK": "SLURM_NODEID",
}


def main() -> None:
    os.environ.update({ours: os.environ[theirs] for ours, theirs in _VARIABLES.items()})
    failed_nodes.came()
    log_into_file()
    try:
        run_script()
    except Exception as error:
        node = failed_nodes.this_node()
        failed_nodes.record(node, f"rank {os.environ['RANK']} on {node} failed: {type(error).__name__}")
        raise


if __name__ == "__main__":
    main()
