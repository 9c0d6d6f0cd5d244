"""`jetmoe launch local` and `ssh` with real ranks, which are killed, stopped and refused."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from jetmoe_megatron.launch.starts import events
from jetmoe_megatron.monitor.jsonl import read_metrics
from jetmoe_megatron.stopping import RESTARTS
from tests.support import REPO, environment, launched, small_run, write_run

TIME_LIMIT = 120
STEPS = 60


@pytest.fixture
def run_file(tmp_path: Path, data: dict[str, str]) -> Path:
    """A run of some seconds, with a checkpoint every 20 steps."""
    changes = {"phases__0__tokens": (STEPS - 3) * 256, "checkpoint__every_tokens": 20 * 256}
    return write_run(tmp_path, small_run(tmp_path, data, **changes))


@contextmanager
def launch(way: str, *arguments: object, **variables: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "jetmoe_megatron.cli", "launch", way, *map(str, arguments)],
        cwd=REPO,
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def rank_of(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """Wait for a rank to be there."""
    deadline = time.monotonic() + TIME_LIMIT
    while time.monotonic() < deadline:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                if "launch.worker" in " ".join(child.cmdline()) and child.environ().get("RANK") == str(rank):
                    return child
        time.sleep(0.02)
    raise TimeoutError(f"no rank {rank}")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["lm_loss"] for line in read_metrics(run / "metrics.jsonl")}


def ends(run: Path) -> list[tuple[int, bool]]:
    """(status, whether it started again) of each start."""
    return [(e["status"], e["again"]) for e in events(run / "starts.jsonl") if e["event"] == "end"]


def test_a_killed_rank_and_the_run_comes_back(run_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launch("local", run_file, "--ranks", 2) as process:
        wait_for(run / f"checkpoints/tokens_{20 * 256}")
        rank = rank_of(process, 1)
        assert rank.environ()[RESTARTS] == "0"
        rank.kill()
        wait_for_start(run, 1)
        assert rank_of(process, 1).environ()[RESTARTS] == "1"
        output, _ = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 0, output
    assert ends(run) == [(137, True), (0, False)]
    assert "signal 9 ended a rank (status 137); " in output and "it starts again, from " in output
    whole = tmp_path / "whole"
    assert launched(2, run_file, f"output_dir={whole}").returncode == 0
    assert losses(run) == losses(whole) and len(losses(run)) == STEPS
    first, *_ = sorted((run / "logs").glob("*-0"))
    assert "training begins" in (first / "rank_0.log").read_text() and (first / "rank_1.log").exists()
    assert not [p for p in psutil.process_iter() if str(tmp_path) in " ".join(_cmdline(p))]


def _cmdline(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_and_stays_stopped(run_file: Path, tmp_path: Path, signum: signal.Signals) -> None:
    run = tmp_path / "run"
    with launch("local", run_file, "--ranks", 2) as process:
        wait_for(run / f"checkpoints/tokens_{20 * 256}")
        if signum == signal.SIGINT:  # as a terminal sends it
            os.killpg(process.pid, signum)
        else:
            process.send_signal(signum)
        output, _ = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 75, output
    assert ends(run) == [(75, False)]
    assert "stopped at" in output and "the job was cancelled" in output and "Traceback" not in output


def test_a_run_that_cannot_get_on_stops(run_file: Path, tmp_path: Path) -> None:
    """Its ranks die before the first checkpoint."""
    run = tmp_path / "run"
    with launch("local", run_file, "--ranks", 1, "checkpoint.every_tokens=100000000") as process:
        for number in range(3):
            wait_for_start(run, number)
            rank_of(process, 0).kill()
        output, _ = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 137
    assert ends(run) == [(137, True), (137, True), (137, False)], output
    assert "3 starts saved no new checkpoint: mend it, and submit it again" in output


def wait_for_start(run: Path, number: int) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while len([e for e in events(run / "starts.jsonl") if e["event"] == "start"]) <= number:
        assert time.monotonic() < deadline, f"no start {number}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "2", "optimizer.max_lrr=1"], "optimizer.max_lrr: unknown key"),
        (["--ranks", "3", "parallel.tensor=2"], "does not divide the world of 3 ranks"),
        (["--ranks", "0"], "--ranks: must be 1 or more, not 0"),
        (["--ranks", "2", "--site", "/no/such.yaml"], "/no/such.yaml: No such file or directory"),
    ],
)
def test_bad_input_starts_nothing(run_file: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    with launch("local", run_file, *arguments) as process:
        output, _ = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 2 and said in output and output.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("way", ["local", "slurm", "ssh"])
def test_print_shows_all_scripts_and_writes_nothing(run_file: Path, tmp_path: Path, way: str) -> None:
    with launch(way, run_file, "--print", "--site", write_site(tmp_path)) as process:
        output, _ = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 0 and output.startswith("#!/usr/bin/env bash\n# Pretrain small on ")
    assert "-m jetmoe_megatron.launch.elastic" in output
    *_, last = output.splitlines()
    assert re.fullmatch(rf"# Needs {tmp_path}/run/launches/\S+/run.yaml: run this command without --print", last)
    sound = subprocess.run(["bash", "-n"], input=output, capture_output=True, text=True)
    assert (sound.returncode, sound.stderr) == (0, "")
    if way != "slurm":
        host = re.search(r"^# --- \S+/host\.sh ---\n(.*)", output, re.DOTALL | re.MULTILINE)
        assert host and host[1].startswith("#!/usr/bin/env bash\n# The ranks of one host")
    assert not (tmp_path / "run").exists()


def write_site(folder: Path) -> Path:
    site = folder / "site.yaml"
    site.write_text("nodes: 2\ngpus_per_node: 0\nranks_per_node: 1\nhosts: [me@localhost, 127.0.0.2, 127.0.0.3]\n")
    return site


def test_a_submitted_job_is_recorded(run_file: Path, tmp_path: Path) -> None:
    """`jetmoe status` knows of it before it begins."""
    (tmp_path / "sbatch").write_text("#!/usr/bin/env bash\necho '4711;cluster'\n")
    (tmp_path / "sbatch").chmod(0o755)
    site, path = write_site(tmp_path), f"{tmp_path}:{environment()['PATH']}"
    with launch("slurm", run_file, "--site", site, PATH=path) as process:
        output, _ = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 0 and output.startswith(f"job 4711: {tmp_path}/run/launches/")
    (event,) = events(tmp_path / "run/starts.jsonl")
    assert (event["event"], event["job"]) == ("submitted", "4711")


# Stands for ssh: runs the command on this machine, as a shell that a user logs in to.
SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
  [[ $1 != -o ]] || shift
  shift
done
echo "$1" >> {folder}/hosts
shift
exec bash -c "$*"
"""


@pytest.mark.parametrize("when", ["begin", "setup"])
def test_a_stop_before_the_ranks_start(when: str, run_file: Path, tmp_path: Path) -> None:
    """It is not forgotten: the ranks do not start."""
    began = tmp_path / "began"
    if when == "begin":
        python = tmp_path / "python"
        python.write_text(
            f'#!/bin/sh\n[ "$3" != begin ] || {{ touch {began}; sleep 1; }}\nexec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        setting = f"python: {python}"
    else:
        setting = f'setup: ["[[ ! ${{host:-}} ]] || {{ touch {began}; sleep 1; }}"]'  # in host.sh
    (tmp_path / "site.yaml").write_text(f"gpus_per_node: 0\nranks_per_node: 2\n{setting}\n")
    with launch("local", run_file, "--site", tmp_path / "site.yaml") as process:
        wait_for(began)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 75 and "training " not in output, output
    assert ends(tmp_path / "run") == [(75, False)]


def test_a_passing_fault_of_the_record_of_starts(run_file: Path, tmp_path: Path) -> None:
    """As of a full disk: it is tried again."""
    python, sleep = tmp_path / "python", tmp_path / "bin/sleep"
    once = f"[ -e {tmp_path}/$3 ] || {{ touch {tmp_path}/$3; exit 1; }}"
    python.write_text(f'#!/bin/sh\n[ "$2" != jetmoe_megatron.launch.job ] || {once}\nexec {sys.executable} "$@"\n')
    sleep.parent.mkdir()
    sleep.write_text("#!/bin/sh\n")
    for program in (python, sleep):
        program.chmod(0o755)
    (tmp_path / "site.yaml").write_text(f"gpus_per_node: 0\nranks_per_node: 1\npython: {python}\n")
    variables = {"PATH": f"{sleep.parent}:{environment()['PATH']}"}
    with launch("local", run_file, "--site", tmp_path / "site.yaml", "debug.max_steps=2", **variables) as process:
        output, _ = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 0, output
    assert (tmp_path / "begin").exists() and (tmp_path / "end").exists()
    assert ends(tmp_path / "run") == [(0, False)]


def test_a_host_that_ssh_loses(run_file: Path, tmp_path: Path) -> None:
    """The next start has another host. The ranks of the lost one may still run, so it is patient."""
    folder = tmp_path / "bin"
    folder.mkdir()
    loses = "[[ $1 != 127.0.0.2 ]] || exit 255\n[[ $* != *kill* ]] || exit 0\necho"
    (folder / "ssh").write_text(SSH.format(folder=folder).replace("echo", loses))
    (folder / "ssh").chmod(0o755)
    variables = {"PATH": f"{folder}:{environment()['PATH']}"}
    site = write_site(tmp_path)
    python, says = (
        tmp_path / "python",
        f'[ "$2" = jetmoe_megatron.launch.job ] || echo $JETMOE_RESTARTS >> {tmp_path}/restarts',
    )
    python.write_text(f'#!/bin/sh\n{says}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    site.write_text(
        site.read_text().replace("nodes: 2", "nodes: 1").replace("me@localhost, ", "") + f"python: {python}\n"
    )
    with launch("ssh", run_file, "--site", site, "debug.max_steps=2", **variables) as process:
        output, _ = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 0, output
    assert ends(tmp_path / "run") == [(4, True), (0, False)]
    assert "127.0.0.2: ssh lost it; it starts again: 1 of 3 starts without a new checkpoint" in output
    assert (tmp_path / "restarts").read_text() == "1\n"


def test_ssh_leaves_out_the_host_that_failed(run_file: Path, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(SSH.format(folder=folder))
    (folder / "ssh").chmod(0o755)
    variables = {"PATH": f"{folder}:{environment()['PATH']}"}
    with launch("ssh", run_file, "--site", write_site(tmp_path), **variables) as process:
        wait_for(run / f"checkpoints/tokens_{20 * 256}")
        rank = next(r for r in (rank_of(process, 0), rank_of(process, 1)) if r.environ()["JETMOE_NODE"] == "127.0.0.2")
        rank.kill()
        output, _ = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 0, output
    assert ends(run) == [(137, True), (0, False)]
    first, second = (set(start["nodes"]) for start in events(run / "starts.jsonl") if start["event"] == "start")
    assert (first, second) == ({"me@localhost", "127.0.0.2"}, {"me@localhost", "127.0.0.3"})
    assert set((folder / "hosts").read_text().split()) == first | second
    assert "127.0.0.2: rank " in output
