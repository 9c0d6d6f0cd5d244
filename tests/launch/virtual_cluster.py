"""A real SLURM on this machine: three nodes with two cores each, all of them this host. Needs Debian's packages
`slurm-wlm` and `munge`, and root, who runs the daemons of the nodes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

MISSING = [
    name
    for name in ("munged", "slurmctld", "slurmd", "sbatch")
    if not shutil.which(name, path=os.defpath + ":/usr/sbin")
]
SKIP = f"not installed: {', '.join(MISSING)}" if MISSING else "" if os.geteuid() == 0 else "needs root"

_CONF = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SchedulerParameters=bf_interval=1,sched_interval=1
KillWait=60
NodeName=n[1-3] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}] CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def virtual_cluster(folder: Path) -> Iterator[None]:
    """While it runs, SLURM's commands use it."""
    for name in ("state", "spool.n1", "spool.n2", "spool.n3"):
        (folder / name).mkdir(parents=True)
    key, conf = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    controller_port, first = _free_ports()
    conf.write_text(
        _CONF.format(
            host=socket.gethostname().split(".")[0],
            folder=folder,
            controller_port=controller_port,
            node_ports=f"{first}-{first + 2}",
        )
    )
    before = dict(os.environ)
    os.environ.update(SLURM_CONF=str(conf), PATH=f"{os.environ['PATH']}:/usr/sbin")
    munge = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid"}
    munge |= {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
    try:
        _run("munged", "--force", *(f"--{option}={value}" for option, value in munge.items()))
        _run("slurmctld", "-i")
        for node in ("n1", "n2", "n3"):
            _run("slurmd", "-N", node)
        _wait_for_nodes()
        yield
    finally:
        with suppress(subprocess.SubprocessError):
            _run("scancel", "--user=root", "--state=RUNNING,PENDING")
        for file in sorted(folder.glob("*.pid")):
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL if "munged" in file.name else signal.SIGTERM)
        os.environ.clear()
        os.environ.update(before)


def slurm(*command: object) -> str:
    """The output of a command of SLURM."""
    return _run(*map(str, command)).stdout


def of_jobs() -> Iterator[psutil.Process]:
    """Processes of this cluster's jobs; another test may have a cluster too."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            variables = process.environ()
            if variables.get("SLURM_CONF") == os.environ["SLURM_CONF"] and "SLURM_JOB_ID" in variables:
                yield process


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def _wait_for_nodes() -> None:
    deadline = time.monotonic() + 60
    while slurm("sinfo", "--noheader", "--Node", "--format=%T").split() != ["idle"] * 3:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the virtual nodes do not come up: {slurm('sinfo')}")
        time.sleep(0.2)


def _free_ports() -> tuple[int, int]:
    """One, and the first of three in a row."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        controller: int = listener.getsockname()[1]
    for first in range(16000 + 3 * (os.getpid() % 1000), 30000, 3):
        with suppress(OSError), socket.socket() as a, socket.socket() as b, socket.socket() as c:
            for number, listener in enumerate((a, b, c)):
                listener.bind(("127.0.0.1", first + number))
            return controller, first
    raise OSError("no three free ports in a row")
