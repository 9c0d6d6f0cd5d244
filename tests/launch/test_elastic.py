"""The launcher with real worker processes: signals reach them, and their exit status is the launcher's."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jetmoe_megatron.launch.elastic import exit_status
from jetmoe_megatron.launch.worker import ended

TIME_LIMIT = 120
# torch's C++ warns of host names that cannot be resolved, which depends on the machine.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

# Stands for the trainer: stops at a signal, saves for as long as argv[1 + rank] says, exits 75.
TRAINER = """
import json, os, pathlib, signal, sys, time
rank, received = int(os.environ["RANK"]), []
for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(signum, lambda n, frame: received.append(n))
pathlib.Path(f"started{rank}").touch()
while len(received) < int(os.environ.get("SIGNALS_TO_STOP", 1)):
    time.sleep(0.02)
time.sleep(float(sys.argv[1 + rank]))
pathlib.Path(f"received{rank}").write_text(json.dumps(received))
sys.exit(75)
"""

# As `python -m jetmoe_megatron.launch.elastic`, with one of its constants changed.
LAUNCHER = """
import sys
import jetmoe_megatron.launch.elastic as elastic
elastic.{}
sys.exit(elastic.main())
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts launchers in `tmp_path` and leaves none of them or their workers behind."""
    launchers: list[subprocess.Popen[str]] = []

    def start(
        worker: str,
        *arguments: str,
        options: str = "--standalone --nproc-per-node 2",
        constant: str = "LAUNCHER_WAITS_FOR_RANKS = 120.0",
        **env: str,
    ) -> subprocess.Popen[str]:
        (tmp_path / "worker.py").write_text(worker)
        command = [sys.executable, "-c", LAUNCHER.format(constant), *options.split(), "worker.py", *arguments]
        launchers.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env={**ENVIRONMENT, **env},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return launchers[-1]

    yield start
    for launcher in launchers:
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGQUIT)  # torch's own way: closes the workers
            try:
                launcher.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.communicate(timeout=10)


def end_of(launcher: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = launcher.communicate(timeout=TIME_LIMIT)
    return launcher.returncode, stderr


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"no {paths}"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("exit_codes", "passed_on", "status"),
    [
        ([75, 75], (), 75),
        ([1, 75], (), 1),
        ([75, 1], (), 1),
        ([75, -signal.SIGTERM, -signal.SIGKILL], (), 75),  # closed by torch after the others had saved
        ([1, -signal.SIGTERM], (), 1),
        ([-signal.SIGTERM], (), 143),
        ([-signal.SIGTERM, -signal.SIGTERM], {signal.SIGTERM}, 75),  # the signal came before their handlers
        ([-signal.SIGKILL, -signal.SIGTERM], {signal.SIGTERM}, 137),  # out of memory while saving
        ([75, -signal.SIGSEGV], (), 139),
        ([-signal.SIGTERM, 2], (), 2),
        ([-signal.SIGTERM, 3], (), 3),  # the loss guard's decision; torch closes who is slower to leave
        ([4, -signal.SIGKILL], (), 4),  # a rank that hangs, named by the others
        ([-signal.SIGKILL, 4], (), 137),
    ],
)
def test_exit_status_of_failed_workers(exit_codes: list[int], passed_on: set[int], status: int) -> None:
    assert exit_status(exit_codes, passed_on) == status


def test_success(start: Start) -> None:
    assert end_of(start("pass"))[0] == 0


def test_what_is_wrong_for_all_ranks_is_said_once(start: Start) -> None:
    worker = """
import os, sys, time
from jetmoe_megatron.launch.worker import say_wrong
time.sleep(float(sys.argv[1 + int(os.environ["RANK"])]))
say_wrong(sys.argv[-1] if os.environ["RANK"] == "1" else "run.yaml: batch: unknown key")
sys.exit(2)
"""
    options = "--standalone --nproc-per-node 2 --max-restarts 1"  # which would repeat it
    key = "run.yaml: batch: unknown key"
    for early in ("0", "3"), ("3", "0"):  # one has ended before the other begins to look
        assert end_of(start(worker, *early, key, options=options)) == (2, f"error: {key}\n")
    assert end_of(start(worker, "0", "1", f"rank 0 on a-node: {key}", options=options)) == (2, f"error: {key}\n")
    assert end_of(start(worker, "0", "1", "no GPU", options=options)) == (2, f"error: {key}\nerror: no GPU\n")


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [("sys.exit(7)", 7, "exited with status 7"), ("os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL")],
)
def test_a_failure_is_named_in_one_line(start: Start, failure: str, status: int, said: str) -> None:
    worker = f"""
import os, sys, time
if os.environ["RANK"] == "1":
    {failure}
time.sleep(60)
"""
    line = f"jetmoe_megatron.launch.elastic: rank 1 on {socket.gethostname()} {said}\n"
    assert end_of(start(worker)) == (status, line)


def test_a_stop_signal_lets_every_worker_save(start: Start, tmp_path: Path) -> None:
    # rank 0 exits 75 a second before rank 1; --max-restarts is for crashes
    launcher = start(TRAINER, "0", "1", options="--standalone --nproc-per-node 2 --max-restarts 1")
    wait_for(tmp_path / "started0", tmp_path / "started1")
    launcher.send_signal(signal.SIGTERM)
    assert end_of(launcher) == (75, "")
    for rank in range(2):  # once: torch did not close rank 1 when rank 0 had ended
        assert json.loads((tmp_path / f"received{rank}").read_text()) == [signal.SIGTERM]


def test_every_stop_signal_is_passed_on(start: Start, tmp_path: Path) -> None:
    launcher = start(TRAINER, "0", "0", SIGNALS_TO_STOP="3")
    wait_for(tmp_path / "started0", tmp_path / "started1")
    signals = [signal.SIGUSR1, signal.SIGINT, signal.SIGTERM]
    for signum in signals:
        launcher.send_signal(signum)
        time.sleep(0.5)
    assert end_of(launcher) == (75, "")
    for rank in range(2):
        assert json.loads((tmp_path / f"received{rank}").read_text()) == signals


def test_a_stop_signal_before_the_workers_listen(start: Start, tmp_path: Path) -> None:
    launcher = start("import os, time; open('started' + os.environ['RANK'], 'w'); time.sleep(60)")
    wait_for(tmp_path / "started0", tmp_path / "started1")
    launcher.send_signal(signal.SIGUSR1)
    assert end_of(launcher) == (75, "")


def test_a_stop_signal_while_waiting_for_the_other_node(start: Start) -> None:
    port = free_port()
    launcher = start("pass", options=f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint localhost:{port} --rdzv-id x")
    deadline = time.monotonic() + TIME_LIMIT
    while True:  # the launcher listens once it has reached the rendezvous
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    status, stderr = end_of(launcher)
    assert status == 75
    assert "Traceback" not in stderr


def test_workers_that_do_not_follow_are_closed(start: Start) -> None:
    worker = """
import os, sys, time
if os.environ["RANK"] == "0":
    sys.exit(75)
time.sleep(120)
"""
    assert end_of(start(worker, constant="LAUNCHER_WAITS_FOR_RANKS = 0.5")) == (75, "")


def test_wrong_arguments() -> None:
    command = [sys.executable, "-m", "jetmoe_megatron.launch.elastic", "--no-such-option"]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert ended.returncode == 2
    assert "usage: python -m jetmoe_megatron.launch.elastic" in ended.stderr


def test_the_first_node_waits_for_the_other(start: Start) -> None:
    """Its launcher hosts the rendezvous: if it left as soon as its workers end, the other would fail."""
    worker = "import os, sys, time; time.sleep(float(os.environ['SECONDS_TO_SAVE'])); sys.exit(75)"
    options = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint localhost:{free_port()} --rdzv-id x"
    first = start(worker, options=f"{options} --rdzv-conf is_host=1", SECONDS_TO_SAVE="0")
    second = start(worker, options=f"{options} --rdzv-conf is_host=0", SECONDS_TO_SAVE="2")
    for node in (first, second):
        status, stderr = end_of(node)
        assert status == 75
        assert "Traceback" not in stderr


def test_bad_input_on_one_node_ends_both(start: Start) -> None:
    worker = "import os, sys, time; time.sleep(float(os.environ['SECONDS'])); sys.exit(2)"
    port = free_port()
    options = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint localhost:{port} --rdzv-id x"
    constant = "LAUNCHER_WAITS_FOR_NODES = 1.0"
    first = start(worker, options=f"{options} --rdzv-conf is_host=1", constant=constant, SECONDS="0")
    second = start(worker, options=f"{options} --rdzv-conf is_host=0", SECONDS="120")
    assert end_of(first) == (2, "")
    status, stderr = end_of(second)  # whose workers were closed, since it lost the rendezvous
    assert status == 1
    assert f"the rendezvous at localhost:{port} failed on {socket.gethostname()}" in stderr
    assert "Traceback" not in stderr


def test_a_signal_to_one_of_two_nodes_stops_both(start: Start, tmp_path: Path) -> None:
    """As in training: the workers agree by all-reduce, so that those without a signal stop as well."""
    worker = """
import os, pathlib, signal, sys, time
import torch, torch.distributed as dist
received = []
signal.signal(signal.SIGUSR1, lambda n, frame: received.append(n))
dist.init_process_group("gloo")
while True:
    stop = torch.tensor([len(received)])
    dist.all_reduce(stop)
    if stop.item():
        break
    pathlib.Path("started" + os.environ["RANK"]).touch()
    time.sleep(0.05)
dist.barrier()
dist.destroy_process_group()  # else gloo's threads may abort the process at its end
sys.exit(75)
"""
    options = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint localhost:{free_port()} --rdzv-id x"
    nodes = [start(worker, options=options) for _ in range(2)]
    wait_for(tmp_path / "started0", tmp_path / "started1")
    nodes[1].send_signal(signal.SIGUSR1)
    for node in nodes:
        status, stderr = end_of(node)
        assert status == 75
        assert "Traceback" not in stderr


def test_something_else_listens_where_the_nodes_are_to_meet(start: Start) -> None:
    """torch waits for its answer for ever, and heeds no signal."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        endpoint = f"127.0.0.1:{other.getsockname()[1]}"
        options = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint {endpoint} --rdzv-id x"
        launcher = start(TRAINER, options=options, constant="NODES_MEET = 3.0")
        _, errors = launcher.communicate(timeout=TIME_LIMIT)
    assert launcher.returncode == 1
    assert f"did not meet the other nodes at {endpoint}" in errors


def test_a_worker_runs_like_a_script_of_its_own(start: Start, tmp_path: Path) -> None:
    worker = """
import json, pathlib, sys
pathlib.Path("seen").write_text(json.dumps([__name__, __file__, sys.argv, sys.path[0]]))
sys.exit("what went wrong")
"""
    status, stderr = end_of(start(worker, "--flag", "x", options="--standalone --nproc-per-node 1"))
    name, file, argv, path = json.loads((tmp_path / "seen").read_text())
    assert (name, argv, path) == ("__main__", ["worker.py", "--flag", "x"], str(tmp_path))
    assert Path(file).name == "worker.py"
    assert status == 1 and stderr.startswith("what went wrong\n")


def test_nothing_is_left_in_the_temporary_folder(start: Start, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    for worker in ("import sys; sys.exit(75)", "raise SystemExit(2)", "1 / 0"):
        end_of(start(worker, TMPDIR=str(tmp_path / "tmp")))
        assert not list((tmp_path / "tmp").glob("jetmoe*"))


def test_a_stop_after_one_worker_was_done(start: Start, tmp_path: Path) -> None:
    worker = "import os, time; open('started' + os.environ['RANK'], 'w'); time.sleep(60 * int(os.environ['RANK']))"
    launcher = start(worker)
    wait_for(tmp_path / "started0", tmp_path / "started1")
    time.sleep(1)
    launcher.send_signal(signal.SIGTERM)
    assert end_of(launcher) == (75, "")


@pytest.mark.parametrize(("left", "status"), [("1", 1), ("4", 4), ("75", 75), ("0", 0)])
def test_a_signal_when_all_workers_have_ended(left: str, status: int, tmp_path: Path) -> None:
    """Batch systems repeat them. A failure does not become the end of a run."""
    launcher = """
import pathlib, signal, sys, types
from jetmoe_megatron.launch import elastic
def interrupted(args):  # as while torch leaves the rendezvous
    raise elastic.SignalException("again", sigval=signal.SIGTERM)
elastic.torchrun.run = interrupted
sys.exit(elastic._run(types.SimpleNamespace(rdzv_endpoint=""), pathlib.Path(sys.argv[1])))
"""
    (tmp_path / "0.begun").touch()
    (tmp_path / "0.ended").write_text(left)
    command = [sys.executable, "-c", launcher, str(tmp_path)]
    assert subprocess.run(command, env=ENVIRONMENT, timeout=TIME_LIMIT).returncode == status


@pytest.mark.parametrize("status", [0, 2, 3, 75, 4])
def test_a_worker_that_cannot_leave_its_status(start: Start, status: int) -> None:
    """The temporary folder is full, or was cleaned."""
    worker = f"import os, shutil, sys; shutil.rmtree(os.environ['JETMOE_LAUNCHER_FOLDER']); sys.exit({status})"
    assert end_of(start(worker, options="--standalone --nproc-per-node 1")) == (status, "")


def test_a_closed_terminal_does_not_change_the_status(start: Start) -> None:
    launcher = start("import sys, time; time.sleep(1); sys.exit(7)", options="--standalone --nproc-per-node 1")
    assert launcher.stderr
    launcher.stderr.close()
    assert launcher.wait(timeout=TIME_LIMIT) == 7


def test_a_folder_that_is_removed_while_a_thread_looks(tmp_path: Path) -> None:
    """As at the end of the launcher."""
    (tmp_path / "status").write_text("0")
    folder, over = tmp_path / "launcher", threading.Event()

    def make_and_remove() -> None:
        while not over.is_set():
            folder.mkdir()
            for rank in range(8):
                os.link(tmp_path / "status", folder / f"{rank}.ended")
            shutil.rmtree(folder)

    maker = threading.Thread(target=make_and_remove)
    maker.start()
    try:
        assert all(set(ended(folder).values()) <= {0} for _ in range(2000))
    finally:
        over.set()
        maker.join()


def test_a_stop_before_the_launcher_listened(start: Start, tmp_path: Path) -> None:
    """srun loses signals while it starts."""
    (tmp_path / "stop").touch()
    launcher = start("open('ran', 'w')", JETMOE_FAILED_NODES=str(tmp_path / "failed_nodes"))
    assert launcher.wait(timeout=TIME_LIMIT) == 75
    assert not (tmp_path / "ran").exists()


def test_restarts_on_several_nodes_are_refused(start: Start) -> None:
    launcher = start(TRAINER, options="--nnodes 2 --max-restarts 1 --rdzv-endpoint localhost:1")
    _, errors = launcher.communicate(timeout=TIME_LIMIT)
    assert launcher.returncode == 2 and "--max-restarts: on several nodes" in errors
