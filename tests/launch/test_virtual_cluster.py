"""`jetmoe launch slurm` on a real SLURM of three virtual nodes: what ends a job, and what brings it back.

docs/slurm.md says which test shows what.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jetmoe_megatron.launch.starts import events
from jetmoe_megatron.monitor.jsonl import read_metrics
from tests.launch.virtual_cluster import SKIP, of_jobs, slurm, virtual_cluster
from tests.support import command, jetmoe, pretrain, small_run, write_run

pytestmark = [pytest.mark.skipif(bool(SKIP), reason=SKIP), pytest.mark.slow]

TIME_LIMIT = 150
EVERY = 20 * 256  # tokens between checkpoints


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with virtual_cluster(tmp_path_factory.mktemp("cluster")):
        yield


@pytest.fixture(autouse=True)
def empty_queue() -> Iterator[None]:
    yield
    slurm("scancel", "--user=root")
    wait_until(lambda: not slurm("squeue", "--noheader"))


def endless(folder: Path, data: dict[str, str], **changes: Any) -> Path:
    """A run that takes longer than any test."""
    changes = {"phases__0__tokens": 3 * 10**6, "checkpoint__every_tokens": EVERY, **changes}
    return write_run(folder, small_run(folder, data, **changes))


def write_site(folder: Path, **changes: Any) -> Path:
    site = {"nodes": 2, "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1, "exclusive": False}
    site |= {"doctor": False, **changes}
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump({"time": "0:30:00", "environment": ["OMP_NUM_THREADS=1"], **site}))
    return path


def submit(run_file: Path, **site: Any) -> str:
    """Returns the number of the job."""
    result = command("jetmoe", "launch", "slurm", run_file, "--site", write_site(run_file.parent, **site))
    assert result.returncode == 0, result.stderr
    return re.match(r"job (\d+): ", result.stdout)[1]  # type: ignore[index]


def wait_until(happens: Callable[[], object], seconds: float = TIME_LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, slurm("squeue")
        time.sleep(0.2)


def state(job: str) -> str:
    return re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", job))[1]  # type: ignore[index]


def start_at_once(job: str) -> None:
    """SLURM lets a job wait two minutes after a requeue, so that its nodes have forgotten the last start."""
    shown = slurm("scontrol", "show", "job", job)
    if "JobState=PENDING Reason=BeginTime" in shown:
        time.sleep(5)
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")


def checkpoints(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").glob("tokens_*") if path.name.removeprefix("tokens_").isdigit()}


def wait_for_ranks(job: str, log: Path) -> None:
    wait_until(lambda: start_at_once(job) or (log.exists() and "training " in log.read_text()))


def wait_for_progress(job: str, run: Path, start: int) -> None:
    """Until this start of the job has trained on, beyond the checkpoint that it began with."""
    wait_for_ranks(job, run / f"logs/{job}-{start}/rank_0.log")
    before = checkpoints(run)
    wait_until(lambda: checkpoints(run) - before)


def rank_on(node: str, job: str) -> psutil.Process:
    for process in of_jobs():
        with suppress(psutil.Error):
            variables, parent = process.environ(), process.parent()
            place = (variables["SLURM_JOB_ID"], variables["SLURMD_NODENAME"])
            watches = parent and re.search(r"launch\.(elastic|slurm_rank)", " ".join(parent.cmdline()))
            if place == (job, node) and watches and process.cmdline()[0] != "tee":
                return process
    raise AssertionError(f"no rank on {node}")


def of_starts(run: Path, event: str, key: str) -> list[Any]:
    return [line[key] for line in events(run / "starts.jsonl") if line["event"] == event]


def test_a_job_that_is_warned_and_killed(tmp_path: Path, data: dict[str, str]) -> None:
    """Each time it goes on from its last checkpoint, and ends with the losses of an uninterrupted run."""
    run = tmp_path / "run"
    run_file = endless(tmp_path, data)
    job = submit(run_file, warning_seconds=600)

    wait_for_progress(job, run, 0)
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # SLURM warns the job: it has less than 600 s left
    wait_until(lambda: of_starts(run, "end", "status"))
    assert of_starts(run, "end", "status") == [75]
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=30")

    wait_for_progress(job, run, 1)
    assert of_starts(run, "start", "nodes") == [["n1", "n2"]] * 2
    rank_on("n2", job).kill()
    wait_until(lambda: len(of_starts(run, "end", "status")) == 2)
    assert of_starts(run, "end", "status")[1] == 137
    assert of_starts(run, "end", "leave_out")[1] == ["n2"]
    end_soon(run)

    wait_until(lambda: start_at_once(job) or state(job) == "COMPLETED")
    assert of_starts(run, "start", "nodes")[2] == ["n1", "n3"]
    assert of_starts(run, "end", "status") == [75, 137, 0]
    output = (run / f"logs/job-{job}.out").read_text()
    assert re.search(r"\(status 137\); n2: rank [01] on n2 was killed by SIGKILL; it starts again, from ", output)
    assert "left out from now on: n2" in output

    found = {line["step"]: line["lm_loss"] for line in read_metrics(run / "metrics.jsonl")}
    whole = tmp_path / "whole"
    assert pretrain(2, run_file, f"output_dir={whole}", f"debug.max_steps={len(found)}").returncode == 0
    assert found == {line["step"]: line["lm_loss"] for line in read_metrics(whole / "metrics.jsonl")}
    last = max(checkpoints(run), key=lambda name: int(name.removeprefix("tokens_")))
    assert int(last.removeprefix("tokens_")) == 256 * len(found)
    assert converted(run / "checkpoints" / last) == converted(whole / "checkpoints" / last)


def end_soon(run: Path) -> None:
    """An endless run is done 50 steps after what it has done until now."""
    (file,) = run.glob("launches/*/run.yaml")
    values = yaml.safe_load(file.read_text())
    values["debug"]["max_steps"] = max(line["step"] for line in read_metrics(run / "metrics.jsonl")) + 50
    file.write_text(yaml.safe_dump(values))


def converted(checkpoint: Path) -> bytes:
    """The weights of a checkpoint."""
    folder = checkpoint.with_suffix(".hf")
    assert jetmoe("convert", "to-hf", checkpoint, folder).returncode == 0
    return (folder / "model.safetensors").read_bytes()


def test_a_job_that_cannot_get_on_stops(tmp_path: Path, data: dict[str, str]) -> None:
    """After two starts, with the same nodes: the cluster has no others."""
    run = tmp_path / "run"
    run_file = endless(tmp_path, data, checkpoint__every_tokens=10**9, batch__global_tokens=6 * 64)
    job = submit(run_file, nodes=3, starts_without_progress=2)
    for start in range(2):
        log = run / f"logs/{job}-{start}/rank_0.log"
        wait_for_ranks(job, log)
        nodes = of_starts(run, "start", "nodes")[start]
        rank_on(nodes[-1], job).kill()
        while len(of_starts(run, "end", "status")) <= start:
            time.sleep(0.2)
    wait_until(lambda: state(job) == "FAILED")
    assert of_starts(run, "end", "again") == [True, False]
    output = (run / f"logs/job-{job}.out").read_text()
    assert "2 starts saved no new checkpoint: mend it, and submit it again" in output
    assert "n3 cannot be left out: no others like it are known for this job" in output


def test_bad_input_is_not_tried_again(tmp_path: Path, data: dict[str, str]) -> None:
    """What `jetmoe launch` finds, and what the ranks find: data that is gone."""
    run_file = endless(tmp_path, data)
    refused = jetmoe("launch", "slurm", run_file, "--site", write_site(tmp_path), "optimizer.max_lrr=1")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert not slurm("squeue", "--noheader") and not (tmp_path / "run").exists()
    job = submit(run_file, setup=[f"sed -i s,{data['code']},/no/such/data, {tmp_path}/run/launches/*/run.yaml"])
    wait_until(lambda: state(job) == "FAILED")
    assert "ExitCode=2:0" in slurm("scontrol", "show", "job", job)
    output = (tmp_path / f"run/logs/job-{job}.out").read_text()
    said = "error: /no/such/data.idx: no such file; a dataset is a pair PREFIX.bin and PREFIX.idx"
    lines = sorted(re.findall("(?:n.: )?error: /no.*", output))
    assert lines in ([said, f"{node}: {said}"] for node in ("n1", "n2"))  # each node says it once
    assert of_starts(tmp_path / "run", "end", "again") == [False]


def test_a_cancel_before_the_ranks_train(tmp_path: Path, data: dict[str, str]) -> None:
    job = submit(endless(tmp_path, data))
    wait_until(lambda: state(job) == "RUNNING")
    slurm("scancel", job)
    wait_until(lambda: state(job) == "CANCELLED")
    time.sleep(3)
    assert state(job) == "CANCELLED"


def test_ranks_that_slurm_starts_itself(tmp_path: Path, data: dict[str, str]) -> None:
    """`tasks: rank`: no launcher of ours on the nodes. SLURM queues the job again, a rank is killed, and a cancel."""
    run = tmp_path / "run"
    job = submit(endless(tmp_path, data), tasks="rank", starts_without_progress=1)
    wait_for_progress(job, run, 0)
    slurm("scontrol", "requeue", job)  # as for a preemption
    wait_until(lambda: of_starts(run, "end", "status"))
    assert of_starts(run, "end", "status") == [75]
    wait_for_progress(job, run, 1)
    rank_on("n2", job).kill()
    wait_until(lambda: len(of_starts(run, "end", "status")) == 2)
    assert of_starts(run, "end", "failed_nodes")[1].keys() == {"n2"}
    assert of_starts(run, "end", "leave_out")[1] == ["n2"]

    wait_for_progress(job, run, 2)
    slurm("scancel", job)
    wait_until(lambda: state(job) in ("CANCELLED", "FAILED", "COMPLETED"))
    wait_until(lambda: len(of_starts(run, "end", "status")) == 3)
    assert (state(job), of_starts(run, "end", "status")) == ("CANCELLED", [75, 137, 75])  # it has saved
    assert of_starts(run, "end", "again") == [True, True, False]
    output = (run / f"logs/job-{job}.out").read_text()
    assert "SLURM itself has queued it again, as after a preemption" in output
    assert "the job was cancelled: submit it again to continue" in output


# Stands for the Python of the nodes. In each start the doctor finds faults of one rank.
PYTHON_WITH_FAULTS = """#!/usr/bin/env bash
faults=("slow_matmul,full_disk 0" "other_version 1")
arguments=()
for argument in "$@"; do
  if [[ $argument == jetmoe_megatron.doctor ]]; then
    read -r fault rank <<<"${{faults[${{SLURM_RESTART_COUNT:-0}}]}}"
    arguments+=(tests.doctor.faults "$fault" "$rank")
  else
    arguments+=("$argument")
  fi
done
exec {python} "${{arguments[@]}}"
"""


def test_the_doctor_finds_what_is_planted(tmp_path: Path, data: dict[str, str]) -> None:
    """A slow rank with a disk that cannot be written: the next start leaves out its node. Then another version, but no
    node is left to take the place: the ranks start all the same."""
    run, python = tmp_path / "run", tmp_path / "python"
    python.write_text(PYTHON_WITH_FAULTS.format(python=sys.executable))
    python.chmod(0o755)
    job = submit(endless(tmp_path, data), python=str(python), doctor=True, doctor_tolerance=0.8)
    wait_until(lambda: of_starts(run, "end", "status"))
    assert of_starts(run, "end", "status") == [5]
    ((node, found),) = of_starts(run, "end", "failed_nodes")[0].items()
    assert "matmul" in found and "(output_dir)" in found
    wait_for_progress(job, run, 1)
    first, second = of_starts(run, "start", "nodes")
    assert node in first and node not in second
    output = (run / f"logs/job-{job}.out").read_text()
    assert re.search("sick: .*Megatron-Core", output)
    assert "no nodes can take the place of what the doctor found: the ranks start all the same" in output
