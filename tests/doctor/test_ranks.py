"""The doctor on real ranks, one of which is slow, different or broken on purpose.

The faults are far greater than the noise of a machine with other work: the tolerance is 90%.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.runtime.device import has_gpu
from tests.doctor import faults
from tests.doctor.faults import on_rank
from tests.injected_faults import ELASTIC, TORCHRUN
from tests.support import REPO, command, environment, small_run, write_run
from tests.warm import Command

pytestmark = pytest.mark.skipif(has_gpu(), reason="several ranks would share the GPU")
TOLERANT = ("--tolerance", "0.9")


def doctor(
    ranks: int, *arguments: object, before: Callable[[], None] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    everything = ["jetmoe", "doctor", "--ranks", *arguments, *TOLERANT]
    return Command(everything, {**environment(), **variables}, REPO, before).run(ranks, timeout=120)


@pytest.fixture
def run_file(tmp_path: Path, data: dict[str, str]) -> Path:
    return write_run(tmp_path, small_run(tmp_path, data))


def kept(folder: Path) -> dict[str, Any]:
    """What the run folder has of the one examination."""
    (table,) = (folder / "run" / "doctor").glob("*.md")
    assert table.read_text().startswith("# jetmoe doctor, 20")
    return json.loads(table.with_suffix(".json").read_text())


def test_nothing_is_wrong(tmp_path: Path, run_file: Path) -> None:
    """Two nodes of two ranks, with tensor parallelism inside each."""
    two_nodes = partial(on_nodes, 2)
    well = doctor(4, run_file, "parallel.tensor=2", "parallel.expert=2", before=two_nodes)
    assert well.returncode == 0, well.stderr
    assert "Nothing is wrong." in well.stdout and well.stderr == ""
    found = kept(tmp_path)
    assert found["findings"] == [] and found["layout"] == "tensor 2 x expert 2 x data 2"
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1, 2, 3]
    first, *others = found["ranks"]
    assert first["rates"].keys() == {"matmul", "memory"} and all(rate > 0 for rate in first["rates"].values())
    ranks_of = {name: ranks for name, (ranks, rate) in first["groups"].items()}
    assert ranks_of["all-reduce, all ranks"] == [0, 1, 2, 3] and ranks_of["all-reduce, tensor"] == [0, 1]
    assert ranks_of["all-reduce, data parallel"] == [0, 2] and "all-to-all, expert" in ranks_of
    pairs = {kind: [pair for pair, rate in found] for kind, found in first["pairs"].items()}
    assert pairs == {"pairs in a node": [[0, 1]], "pairs between nodes": [[0, 2]]}
    assert [bool(rank["disk"]) for rank in found["ranks"]] == [True, False, True, False]
    assert first["disk"]["written"] > 0 and first["disk"]["read"] > 0 and not first["disk"]["problem"]
    assert first["runs_on"]["torch"] and first["runs_on"]["code"] and first["runs_on"]["run file"]
    assert all(abs(rank["clock"]["ahead"]) < 0.5 for rank in others)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"doctor"}


def on_nodes(ranks_of_each: int) -> None:
    os.environ["SLURMD_NODENAME"] = f"node{int(os.environ['RANK']) // ranks_of_each}"


def test_pipeline_neighbours_are_measured(tmp_path: Path, run_file: Path) -> None:
    well = doctor(2, run_file, "parallel.pipeline=2")
    assert well.returncode == 0, well.stderr
    ((pair, rate),) = kept(tmp_path)["ranks"][0]["pairs"]["pairs of stages"]
    assert pair == [0, 1] and rate > 0


def test_without_a_run_file_all_ranks_are_one_group(tmp_path: Path) -> None:
    well = doctor(2)
    assert well.returncode == 0, well.stderr
    assert "all-reduce, all ranks" in well.stdout and "all-to-all, all ranks" in well.stdout


def test_one_rank_without_a_launcher(tmp_path: Path, run_file: Path) -> None:
    alone = doctor(1, run_file)
    assert alone.returncode == 0, alone.stderr
    assert "Ranks: 1 on 1 node." in alone.stdout and len(kept(tmp_path)["ranks"]) == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (faults.slow_matmul, "sick: rank 1 on node1: matmul "),
        (faults.other_code, "sick: rank 1 on node1: code 000000000000, 1 of 2 ranks have "),
    ],
)
def test_a_rank_is_named(fault: Callable[[], None], said: str, tmp_path: Path, run_file: Path) -> None:
    """Also to the job script."""
    failed = tmp_path / "failed"
    sick = doctor(2, run_file, before=partial(on_rank, 1, fault), JETMOE_FAILED_NODES=str(failed))
    assert sick.returncode == 5
    assert sick.stderr.startswith(said) and sick.stderr.count("\n") == 1, sick.stderr
    assert "| rank | node  |" in sick.stdout  # the table is there too
    assert [file.name for file in failed.iterdir()] == ["node1"]
    assert (failed / "node1").read_text() == sick.stderr.removesuffix("\n")
    assert f"sick: {kept(tmp_path)['findings'][0]['who']}: " in said


def test_a_wrong_clock_is_only_a_warning(tmp_path: Path, run_file: Path) -> None:
    """The start goes on, with that node."""
    failed = tmp_path / "failed"
    warned = doctor(2, run_file, before=partial(on_rank, 1, faults.wrong_clock), JETMOE_FAILED_NODES=str(failed))
    assert warned.returncode == 0
    assert warned.stderr == "warning: rank 1 on node1: its clock is 60.0 s ahead\n"
    assert "\n- warning: rank 1 on node1" in warned.stdout and not failed.exists()
    assert [finding["kind"] for finding in kept(tmp_path)["findings"]] == ["warning"]


def test_a_table_that_cannot_be_kept_is_only_a_warning(tmp_path: Path, run_file: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "doctor").touch()
    warned = doctor(1, run_file)
    assert warned.returncode == 0
    assert warned.stderr.startswith("warning: rank 0 on ") and "the table cannot be kept in " in warned.stderr


def test_another_version_is_named_and_all_is_measured(tmp_path: Path, run_file: Path) -> None:
    """The trainer would refuse it."""
    batch = "batch.global_tokens=192"  # which three ranks can divide
    sick = doctor(3, run_file, batch, before=partial(on_rank, 2, faults.other_version, tmp_path / "packages"))
    assert sick.returncode == 5
    assert sick.stderr.startswith("sick: rank 2 on node2: Megatron-Core 9.8.7, 2 of 3 ranks have "), sick.stderr
    assert all(rank["rates"]["matmul"] > 0 for rank in kept(tmp_path)["ranks"])


def test_a_rank_with_slow_connections_is_named(run_file: Path) -> None:
    """It is in every slow pair."""
    sick = doctor(4, run_file, before=partial(on_rank, 2, faults.slow_pairs))
    assert sick.returncode == 5
    assert sick.stderr.startswith("sick: rank 2 on node2: each of its pairs between nodes "), sick.stderr
    assert sick.stderr.count("\n") == 1


def test_a_slow_group_is_named_if_no_rank_is(run_file: Path) -> None:
    sick = doctor(4, run_file, "parallel.tensor=2", before=partial(on_rank, 3, faults.slow_all_reduce))
    assert sick.returncode == 5
    assert "sick: rank 2, 3 on node2, node3: all-reduce, tensor " in sick.stderr
    assert "sick: rank 1, 3 on node1, node3: all-reduce, data parallel " in sick.stderr
    assert "rank 0" not in sick.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_its_gpu_is_named_before_the_others_wait_for_it(rank: int, run_file: Path) -> None:
    everything = ["jetmoe", "doctor", "--ranks", run_file]
    began = time.monotonic()
    on_their_own = Command(everything, environment(), REPO, partial(on_rank, rank, faults.promised_gpu))
    ended = on_their_own.to_their_ends(2)
    assert time.monotonic() - began < 60 and [one.returncode for one in ended] == [5, 5]
    line = f"sick: rank {rank} on node{rank}: no GPU that can be used (device: CUDA_VISIBLE_DEVICES is 0, but torch"
    assert ended[0].stderr.startswith(line) and ended[0].stderr.count("\n") == 1 and ended[1].stderr == ""


def test_a_rank_that_fails_alone_is_named(tmp_path: Path, run_file: Path) -> None:
    failed = tmp_path / "failed"
    sick = doctor(2, run_file, before=partial(on_rank, 1, faults.failing_matmul), JETMOE_FAILED_NODES=str(failed))
    assert sick.returncode == 5
    line = "sick: rank 1 on node1: matmul: CUDA error: uncorrectable ECC error encountered\n"
    assert line in sick.stderr and (failed / "node1").read_text() + "\n" == line


def test_a_rank_that_hangs_is_named(tmp_path: Path, run_file: Path) -> None:
    hangs = doctor(
        2, run_file, "parallel.timeout_minutes=0.15", before=partial(on_rank, 1, faults.hanging, tmp_path / "hangs")
    )
    assert hangs.returncode == 4
    assert (
        "error: examining the ranks took longer than 0.15 minutes: rank 1 of 2 did not get past: matmul" in hangs.stderr
    ), hangs.stderr


def test_a_full_disk_of_one_node(tmp_path: Path, run_file: Path) -> None:
    failed = tmp_path / "failed"
    sick = doctor(2, run_file, before=partial(on_rank, 1, faults.full_disk), JETMOE_FAILED_NODES=str(failed))
    assert sick.returncode == 5
    line = f"sick: rank 1 on node1: a file in {tmp_path} (output_dir): File too large\n"
    assert sick.stderr == line and [file.name for file in failed.iterdir()] == ["node1"]
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "run", "failed"}  # and no part of the file


def test_a_read_only_file_system(tmp_path: Path, run_file: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if command("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk).returncode:
        pytest.skip("a read-only file system must be mounted, which this user may not")
    try:
        sick = doctor(2, run_file, f"output_dir={disk}/run")
    finally:
        assert command("umount", disk).returncode == 0
    assert sick.returncode == 5 and sick.stdout.startswith("# jetmoe doctor, ")
    assert sick.stderr.endswith(f": a file in {disk} (output_dir): Read-only file system\n")


@pytest.mark.parametrize("launcher", [pytest.param(TORCHRUN, marks=pytest.mark.slow), ELASTIC])
def test_a_disk_that_cannot_be_written(tmp_path: Path, run_file: Path, launcher: tuple[str, ...]) -> None:
    """No traceback, and the table is printed. torchrun itself turns the status into 1. No node is left out."""
    arguments = ["-m", "jetmoe_megatron.doctor", "--ranks", run_file, f"output_dir={run_file}/run", *TOLERANT]
    failed = f"JETMOE_FAILED_NODES={tmp_path / 'failed'}"
    sick = command("env", failed, sys.executable, *launcher, "--nproc-per-node=2", *arguments)
    assert sick.returncode == (5 if launcher == ELASTIC else 1)
    assert f": a file in {run_file} (output_dir): Not a directory\n" in sick.stderr
    assert "# jetmoe doctor, " in sick.stdout
    assert sick.stderr.count("Traceback") == (launcher == TORCHRUN)  # torchrun's own
    assert not (tmp_path / "failed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ELASTIC])
def test_a_slow_rank_under_a_launcher(run_file: Path, launcher: tuple[str, ...]) -> None:
    module = ["-m", "tests.doctor.faults", "slow_matmul", "1"]
    sick = command(
        sys.executable, *launcher, "--nproc-per-node=2", *module, "--ranks", run_file, *TOLERANT, timeout=120
    )
    assert sick.returncode == (5 if launcher == ELASTIC else 1)
    assert "sick: rank 1 on node1: matmul " in sick.stderr and "Nothing is wrong" not in sick.stdout


def test_all_is_well_under_torchrun(tmp_path: Path, run_file: Path) -> None:
    module = ["-m", "jetmoe_megatron.doctor", "--ranks"]
    well = command(sys.executable, *TORCHRUN, "--nproc-per-node=2", *module, run_file, *TOLERANT, timeout=120)
    assert well.returncode == 0, well.stderr
    assert kept(tmp_path)["findings"] == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once(tmp_path: Path, run_file: Path, signum: signal.Signals) -> None:
    out, err, hangs = (tmp_path / name for name in ("out", "err", "hangs"))
    slow = partial(on_rank, 1, faults.hanging, hangs)
    processes = Command(["jetmoe", "doctor", "--ranks", run_file], environment(), REPO, slow).start(2, out, err)
    try:
        deadline = time.monotonic() + 60
        while not hangs.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)  # rank 1 hangs in its matmul, and rank 0 waits for it in gloo
        assert [process.exitcode for process in processes] == [None, None]
        for process in processes:
            os.kill(process.pid, signum)
        for process in processes:
            process.join(5)
        assert [process.exitcode for process in processes] == [-signum, -signum]
    finally:
        for process in processes:
            process.kill()
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "out", "err", "hangs"}


def test_bad_input(run_file: Path) -> None:
    for arguments, said in (
        ((run_file, "parallel.tensor=3"), "error: parallel: tensor 3"),
        ((run_file, "--tolerance", "1.5"), "error: --tolerance: must be between 0 and 1, not 1.5"),
        ((run_file, "--disk-bytes", "0"), "error: --disk-bytes: must be 1 or more, not 0"),
        (("seed=1",), "error: seed=1: name the run file before the settings that it changes"),
        (("missing.yaml",), "error: missing.yaml"),
    ):
        refused = Command(["jetmoe", "doctor", "--ranks", *arguments], environment(), REPO).run(2)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
