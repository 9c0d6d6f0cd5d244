"""The SLURM script with stand-ins for srun and scontrol that record how they were called."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "slurm" / "pretrain_jetmoe.sbatch"
TIME_LIMIT = 90

# Like srun: forwards signals (here to a file), and ends when the tasks have.
SRUN = """#!/usr/bin/env bash
trap 'echo USR1 >> signals' USR1
trap 'echo TERM >> signals' TERM
cd "$RECORDS"
if [[ $* == *jetmoe_megatron.doctor* ]]; then
  for node in $SICK; do echo "rank 9 is slow" > "$JETMOE_FAILED_NODES/$node"; done
  exit "${DOCTOR_STATUS:-0}"
fi
printf '%s\\n' "$@" > srun
env > environment
for node in $FAILED_NODES; do echo "rank 9 on $node was killed" > "$JETMOE_FAILED_NODES/$node"; done
[[ ! $SAVED ]] || mkdir -p "$OUTPUT/jetmoe-8b/checkpoints/tokens_$SAVED"
touch started
while [[ $SRUN_SIGNALS -gt $( (cat signals 2>/dev/null || true) | wc -l) ]]; do sleep 0.05; done
[[ $SRUN_SIGNALS = 0 ]] || sleep 1
touch ended
exit "$SRUN_STATUS"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$RECORDS/scontrol"
restarts() {
  if [[ $RESTARTS_LATER && $(grep -c "show job" "$RECORDS/scontrol") -gt 1 ]]; then
    echo "$RESTARTS_LATER"
  else
    echo "${RESTARTS:-${SLURM_RESTART_COUNT:-0}}"
  fi
}
case "$1 $2" in
  "show hostnames") [[ $3 == "gpu[07-09]" ]] && printf 'gpu%s\\n' 07 08 09 || tr , '\\n' <<< "$3" ;;
  "show job") echo "  JobState=RUNNING Reason=${REASON:-None} Restarts=$(restarts) BatchFlag=1"
    echo "  ReqNodeList=(null) ExcNodeList=${LEFT_OUT_BEFORE:-(null)} Features=${FEATURES:-(null)}"
    echo "   Comment=$( (echo "Comment=$COMMENT"; cat "$RECORDS/scontrol") | sed -n 's/.*Comment=//p' | tail -n 1) " ;;
  "show node") echo "   NodeAddr=$3-ib NodeHostName=$3 Version=22.05" ;;
  update*) [[ ! $REFUSES || $* != *$REFUSES* ]] ;;
  requeue*) [[ $(grep -c requeue "$RECORDS/scontrol") -gt ${REQUEUE_FAILURES:-0} ]] ;;
esac
"""
SINFO = """#!/usr/bin/env bash
case "$*" in
  *--nodes=gpu07*) echo "96 gpu:8(S:0-1)" ;;
  *) for node in $PARTITION; do
      [[ $node == *:* ]] || node+=:mix
      [[ $node == cpu* ]] && echo "${node/:/ } 64 (null)" || echo "${node/:/ } 96 gpu:8(S:0-1) "
    done ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sinfo", SINFO)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    ours = ("SLURM_", "NCCL_", "OMP_NUM_THREADS", "PYTHON", "JETMOE_")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DATA": str(tmp_path),
        "OUTPUT": str(tmp_path),
        "RECORDS": str(tmp_path),
        "SRUN_STATUS": "0",
        "SRUN_SIGNALS": "0",
        "FAILED_NODES": "",
        "SAVED": "",
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "gpu[07-09]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURMD_NODENAME": "gpu07",
        "SLURM_JOB_PARTITION": "gpu",
        "PARTITION": "gpu05 gpu07 gpu08 gpu09",  # its nodes
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "96",
    }


def start(environment: dict[str, str], *arguments: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", SCRIPT, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its step can be ended with it
    )


def run(environment: dict[str, str], *arguments: str, cwd: Path = ROOT) -> tuple[int, str]:
    job = start(environment, *arguments, cwd=cwd)
    output, _ = job.communicate(timeout=TIME_LIMIT)
    return job.returncode, output


def requeued(tmp_path: Path) -> bool:
    return "requeue 1234567" in (tmp_path / "scontrol").read_text().splitlines()


def test_directives() -> None:
    lines = SCRIPT.read_text().splitlines()
    directives = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert directives >= {
        *("--nodes=12", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive"),
        *("--signal=B:USR1@600", "--requeue", "--open-mode=append"),
    }
    assert any(directive.startswith("--output=") and "%j" in directive for directive in directives)
    assert any(directive.startswith("--time=") for directive in directives)  # without it, no signal either


def test_command_on_each_node(environment: dict[str, str], tmp_path: Path) -> None:
    run_file = "configs/jetmoe_8b/run.yaml"
    assert run(environment, run_file, "name=a b", "debug.max_steps=2")[0] == 0
    srun_options, command = (tmp_path / "srun").read_text().split("\npython\n")
    assert "--kill-on-bad-exit=0" in srun_options.splitlines()
    assert "--cpus-per-task=96" in srun_options.splitlines()
    assert command.splitlines() == [
        *("-m", "jetmoe_megatron.launch.elastic", "--nnodes=3", "--nproc-per-node=8", "--max-restarts=0"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=gpu07-ib:29134", "--rdzv-id=1234567-0"),
        *("pretrain_jetmoe.py", run_file, "name=a b", "debug.max_steps=2"),
    ]


def test_default_run_and_environment(environment: dict[str, str], tmp_path: Path) -> None:
    python = tmp_path / "bin" / "a-python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment |= {"PYTHON": str(python), "SLURM_RESTART_COUNT": "4", "NCCL_DEBUG": "INFO"}
    assert run(environment, "seed=2")[0] == 0
    command = (tmp_path / "srun").read_text().split(f"\n{python}\n")[1].splitlines()
    assert command[-4:] == ["--rdzv-id=1234567-4", "pretrain_jetmoe.py", "configs/jetmoe_8b/run.yaml", "seed=2"]
    variables = (tmp_path / "environment").read_text().splitlines()
    assert {"OMP_NUM_THREADS=12", "NCCL_DEBUG=INFO", "TORCHINDUCTOR_COMPILE_THREADS=4"} <= set(variables)
    assert f"JETMOE_RANK_LOGS={tmp_path}/jetmoe-8b/logs/1234567-4" in variables


def test_a_run_file_with_an_equals_sign_in_its_path(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "lr=3e-4").mkdir()
    for file in ("jetmoe_8b/run.yaml", "jetmoe_8b/phase1.yaml", "jetmoe_8b/phase2.yaml", "models/jetmoe_8b.yaml"):
        (tmp_path / file.replace("jetmoe_8b/", "lr=3e-4/", 1)).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "configs" / file, tmp_path / re.sub("^jetmoe_8b", "lr=3e-4", file))
    run(environment, str(tmp_path / "lr=3e-4/run.yaml"), "seed=3")
    assert (tmp_path / "srun").read_text().splitlines()[-2:] == [str(tmp_path / "lr=3e-4/run.yaml"), "seed=3"]


@pytest.mark.parametrize("status", [0, 1, 2, 3, 4, 5, 75, 137, 138])
def test_which_statuses_are_queued_again(environment: dict[str, str], tmp_path: Path, status: int) -> None:
    assert run(environment | {"SRUN_STATUS": str(status)})[0] == status
    assert requeued(tmp_path) == (status not in (0, 2, 3))


def test_starts_without_progress_are_limited(environment: dict[str, str], tmp_path: Path) -> None:
    saved = ["", "100", "", "", "", ""]  # by each start
    for number, tokens in enumerate(saved):
        start = {"SLURM_RESTART_COUNT": str(number), "SRUN_STATUS": "137", "SAVED": tokens}
        status, output = run(environment | start)
        (tmp_path / "scontrol").rename(tmp_path / f"scontrol{number}")
        assert status == 137
        again = "requeue 1234567" in (tmp_path / f"scontrol{number}").read_text()
        assert again == (number < 4), output
        if not again:
            break
    assert "3 starts saved no new checkpoint: mend it, and submit it again" in output


@pytest.mark.parametrize(
    ("variables", "left_out"),
    [
        ({"FAILED_NODES": ""}, None),
        ({"FAILED_NODES": "gpu08"}, "gpu08"),
        ({"FAILED_NODES": "gpu07", "LEFT_OUT_BEFORE": "gpu06"}, "gpu06,gpu07"),
        ({"FAILED_NODES": "gpu07 gpu08"}, None),  # two of three: only two others are left
        ({"FAILED_NODES": "gpu07", "LEFT_OUT_BEFORE": "gpu05"}, None),
        ({"FAILED_NODES": "gpu08", "PARTITION": "cpu1 cpu2 gpu07 gpu08 gpu09"}, None),  # others are not like them
        ({"FAILED_NODES": "gpu08", "PARTITION": "gpu05:drain gpu06:idle* gpu07 gpu08 gpu09"}, None),
        ({"FAILED_NODES": "gpu08", "PARTITION": "gpu05:idle~ gpu07 gpu08 gpu09"}, "gpu08"),  # powered down
        ({"FAILED_NODES": "gpu08", "FEATURES": "h100"}, None),  # the job asks for certain nodes
        ({"FAILED_NODES": "gpu07 gpu08 gpu09", "PARTITION": "1 2 3 4 5 6"}, None),  # all: not their fault
    ],
)
def test_nodes_that_failed_are_left_out(
    environment: dict[str, str], tmp_path: Path, variables: dict[str, str], left_out: str | None
) -> None:
    _, output = run(environment | {"SRUN_STATUS": "137"} | variables)
    calls = (tmp_path / "scontrol").read_text().splitlines()
    assert "requeue 1234567" in calls
    updates = [call for call in calls if call.startswith("update")]
    assert updates == ([f"update JobId=1234567 ExcNodeList={left_out}"] if left_out else []), output
    if not left_out and len(variables["FAILED_NODES"].split()) in (1, 2):
        assert "cannot be left out: no others like it are known for this job" in output


@pytest.mark.parametrize(
    ("sick", "before", "trains"),
    [
        ("gpu08", "", False),
        ("", "", True),
        ("gpu08 gpu09", "", True),
        ("gpu08", "gpu05", True),
        ("gpu07 gpu08 gpu09", "", True),  # all of them: not their fault
    ],
)
def test_a_sick_rank_ends_the_start_if_another_node_can_take_its_place(
    environment: dict[str, str], tmp_path: Path, sick: str, before: str, trains: bool
) -> None:
    status, output = run(environment | {"DOCTOR_STATUS": "5", "SICK": sick, "LEFT_OUT_BEFORE": before})
    assert (status == 0) == trains == (tmp_path / "srun").exists()
    assert requeued(tmp_path) != trains
    assert ("no nodes can take the place of what the doctor found" in output) == trains


@pytest.mark.parametrize("fault", ["begin", "end"])
def test_a_passing_fault_outside_the_ranks_brings_the_job_back(
    environment: dict[str, str], tmp_path: Path, fault: str
) -> None:
    """Three starts in a row at most."""
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\n[ "$3" != {fault} ] || exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    sleep = tmp_path / "bin" / "sleep"
    sleep.write_text("#!/bin/sh\n")
    sleep.chmod(0o755)
    for number in range(3):
        (tmp_path / "started").unlink(missing_ok=True)
        status, output = run(environment | {"SLURM_RESTART_COUNT": str(number), "SRUN_STATUS": "137"})
        assert status == (1 if fault == "begin" else 137)
        assert f"{number + 1} of 3 in a row" in output, output
    calls = (tmp_path / "scontrol").read_text()
    assert calls.count("requeue 1234567") == 2 and "ExcNodeList" not in calls  # not the fault of this node


@pytest.mark.parametrize("fault", ["no mount", "no Python"])
def test_a_node_that_cannot_begin_is_left_out(environment: dict[str, str], tmp_path: Path, fault: str) -> None:
    if fault == "no mount":
        _, output = run(environment | {"COMMENT": "for me"}, cwd=tmp_path)
    else:
        _, output = run(environment | {"COMMENT": "for me", "PYTHON": "/no/such/python"})
    calls = [call for call in (tmp_path / "scontrol").read_text().splitlines() if call.startswith(("update", "req"))]
    assert calls == [
        "update JobId=1234567 Comment=for me jetmoe-faults-1",
        "requeue 1234567",
        "update JobId=1234567 ExcNodeList=gpu07",
    ], output


def test_faults_that_cannot_be_counted_end_the_job(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin/sleep").write_text("#!/bin/sh\n")
    (tmp_path / "bin/sleep").chmod(0o755)
    assert run(environment | {"REFUSES": "Comment"}, cwd=tmp_path)[0] == 1
    assert not requeued(tmp_path)


def test_faults_are_forgotten_after_a_start(environment: dict[str, str], tmp_path: Path) -> None:
    run(environment | {"COMMENT": "for me jetmoe-faults-2", "SRUN_STATUS": "137"})
    assert "update JobId=1234567 Comment=for me" in (tmp_path / "scontrol").read_text().splitlines()


@pytest.mark.parametrize(
    ("signum", "restarts", "again", "left"),
    [("USR1", 0, True, 75), ("TERM", 0, False, 75), ("TERM", 1, False, 75)],
    ids=["warned", "cancelled", "preempted"],
)
def test_a_signal_before_the_ranks_start(
    environment: dict[str, str], tmp_path: Path, signum: str, restarts: int, again: bool, left: int
) -> None:
    python = tmp_path / "bin" / "python"
    signals = f'[ "$3" != begin ] || kill -{signum} $(ps -o sid= -p $$)'
    python.write_text(f'#!/bin/sh\n{signals}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    status, output = run(environment | {"RESTARTS": "0"} | ({"RESTARTS_LATER": "1"} if restarts else {}))
    assert status == left, output
    assert requeued(tmp_path) == again
    assert not (tmp_path / "srun").exists() and "Comment" not in (tmp_path / "scontrol").read_text()


def test_a_stop_that_srun_does_not_pass_on(environment: dict[str, str], tmp_path: Path) -> None:
    """While it starts: launchers find a file."""
    job = start(environment | {"SRUN_STATUS": "75", "SRUN_SIGNALS": "1"})
    wait_for(tmp_path / "started")
    assert not (tmp_path / "jetmoe-8b/logs/1234567-0/stop").exists()
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=TIME_LIMIT)
    assert (tmp_path / "jetmoe-8b/logs/1234567-0/stop").exists()


def test_a_cancel_before_the_job_is_queued_again(environment: dict[str, str], tmp_path: Path) -> None:
    scontrol = tmp_path / "bin/scontrol"
    slow = f"[[ $* != *Comment=* ]] || {{ touch {tmp_path}/counts; sleep 3; }}"
    scontrol.write_text(SCONTROL.replace("case", f"{slow}\ncase", 1))
    job = start(environment, cwd=tmp_path)
    wait_for(tmp_path / "counts")
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=TIME_LIMIT)
    assert not requeued(tmp_path)


def test_a_cancel_while_the_job_is_queued_again(environment: dict[str, str], tmp_path: Path) -> None:
    sleep = tmp_path / "bin" / "sleep"
    sleep.write_text(f"#!/bin/sh\ntouch {tmp_path}/sleeps\nexec {shutil.which('sleep')} 5\n")
    sleep.chmod(0o755)
    job = start(environment | {"SRUN_STATUS": "137", "REQUEUE_FAILURES": "1"})
    wait_for(tmp_path / "sleeps")
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=TIME_LIMIT)
    assert (tmp_path / "scontrol").read_text().count("requeue 1234567") == 1


def test_bad_input_reaches_no_node(environment: dict[str, str], tmp_path: Path) -> None:
    status, output = run(environment, "optimizer.max_lrr=1")
    assert status == 2 and "optimizer.max_lrr: unknown key" in output
    assert not (tmp_path / "srun").exists() and not requeued(tmp_path)


def test_queueing_again_is_tried_again(environment: dict[str, str], tmp_path: Path) -> None:
    """As SLURM's controller may be away."""
    assert run(environment | {"SRUN_STATUS": "75", "REQUEUE_FAILURES": "1"})[0] == 75
    assert (tmp_path / "scontrol").read_text().count("requeue 1234567") == 2


@pytest.mark.parametrize(
    ("signum", "status", "says", "again"),
    [
        (signal.SIGTERM, 75, {"REASON": "TimeLimit"}, True),  # saving has taken longer than the time that was left
        (signal.SIGTERM, 75, {}, False),
        (signal.SIGUSR1, 138, {}, True),  # the launcher was still starting
        (signal.SIGTERM, 138, {}, False),
        (signal.SIGTERM, 75, {"RESTARTS_LATER": "1"}, False),  # preempted: SLURM has queued it again
    ],
)
def test_why_it_was_stopped(
    environment: dict[str, str],
    tmp_path: Path,
    signum: signal.Signals,
    status: int,
    says: dict[str, str],
    again: bool,
) -> None:
    job = start(environment | {"SRUN_STATUS": str(status), "SRUN_SIGNALS": "1"} | says)
    try:
        wait_for(tmp_path / "started")
        job.send_signal(signum)
        job.communicate(timeout=TIME_LIMIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == status
    assert requeued(tmp_path) == again


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("signals", "again"),
    [
        ((signal.SIGUSR1,), True),
        ((signal.SIGUSR1, signal.SIGUSR1), True),
        ((signal.SIGTERM,), False),  # cancelled: saved, but not to be started again
        ((signal.SIGUSR1, signal.SIGTERM), False),
    ],
)
def test_signals_reach_the_step_and_its_end_is_awaited(
    environment: dict[str, str], tmp_path: Path, signals: tuple[signal.Signals, ...], again: bool
) -> None:
    job = start(environment | {"SRUN_STATUS": "75", "SRUN_SIGNALS": str(len(signals))})
    try:
        wait_for(tmp_path / "started")
        for signum in signals:
            job.send_signal(signum)
            time.sleep(0.3)
        job.communicate(timeout=TIME_LIMIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 75
    assert (tmp_path / "signals").read_text() == "USR1\n" * len(signals)
    assert (tmp_path / "ended").exists()
    assert requeued(tmp_path) == again


def test_submitted_from_elsewhere(environment: dict[str, str], tmp_path: Path) -> None:
    status, output = run(environment, cwd=tmp_path)
    assert status == 1
    assert "submit from the folder that their paths start in\n" in output
    assert not (tmp_path / "srun").exists()
