"""docs/cluster.md, command by command, on a real SLURM of three virtual nodes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.launch.virtual_cluster import SKIP, of_jobs, slurm, virtual_cluster
from tests.support import REPO, command, small_run, write_run

pytestmark = [pytest.mark.skipif(bool(SKIP), reason=SKIP), pytest.mark.slow]

BLOCKS = re.findall(r"```bash\n(.*?)```", (REPO / "docs/cluster.md").read_text(), re.S)
SITE = """
nodes: 2
gpus_per_node: 0
ranks_per_node: 1
cpus_per_node: 1
exclusive: false
time: 0:30:00
doctor_tolerance: 0.95
"""


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with virtual_cluster(tmp_path_factory.mktemp("cluster")):
        yield


def wait_for_jobs() -> None:
    """Those that wait after a requeue are started at once, as soon as their nodes have forgotten the last start."""
    deadline = time.monotonic() + 240
    while jobs := slurm("squeue", "--noheader", "--format=%i %r").split("\n")[:-1]:
        assert time.monotonic() < deadline, slurm("squeue")
        for job, reason in (line.split(maxsplit=1) for line in jobs):
            if reason == "BeginTime":
                time.sleep(5)
                slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(0.5)


def test_word_for_word(tmp_path: Path, data: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "runs"
    run = write_run(tmp_path, small_run(tmp_path, data, phases__0__tokens=200 * 256, checkpoint__every_tokens=2560))
    run.write_text(run.read_text().replace(str(tmp_path / "run"), str(output / "jetmoe-8b")))
    (tmp_path / "site.yaml").write_text(SITE)
    names, *blocks = BLOCKS
    values = {"DATA": "", "OUTPUT": output, "RANKS": 2, "RUN": run, "SITE": tmp_path / "site.yaml"}
    assert set(re.findall(r"\b(\w+)=", names)) == set(values)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    began = time.monotonic()
    for block in blocks:
        done = command("bash", "-euc", block)
        assert done.returncode in ((0, 5) if "doctor" in block else (0,)), block + done.stdout + done.stderr
        print(f"{time.monotonic() - began:5.0f} s  {block}{done.stdout}")
        if "output_dir=$OUTPUT/rehearsal\n" in block:
            kill_a_rank(output / "rehearsal")
        if "launch slurm" in block:
            wait_for_jobs()
            print(f"{time.monotonic() - began:5.0f} s  the job is done")
    status = command("jetmoe", "status", output / "jetmoe-8b").stdout
    assert "done" in status and "the run is done (status 0)" in status
    assert "137" in command("jetmoe", "status", output / "rehearsal").stdout
    assert list((output / "jetmoe-8b/doctor").glob("*.md"))


def kill_a_rank(run: Path) -> None:
    before, deadline = set((run / "checkpoints").glob("tokens_*")), time.monotonic() + 240
    while set((run / "checkpoints").glob("tokens_*")) <= before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for process in of_jobs():
        with suppress(psutil.Error):
            if "launch.worker" in " ".join(process.cmdline()):
                return process.kill()
    raise AssertionError("no rank")
