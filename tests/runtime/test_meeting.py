"""Before the ranks join a process group they compare what they run on, and nobody waits for one that will not come."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from tests.injected_faults import ELASTIC
from tests.ranks import run_ranks
from tests.support import command, small_run, training, write_run


def meeting(packages: str = "", late: float = 0.0, ends: bool = False, minutes: float = 1.0) -> str:
    """On rank 1: other packages are installed, it comes late, or it ends before it has come."""
    import sys

    from jetmoe_megatron.errors import SharedError
    from jetmoe_megatron.runtime.device import process_group

    if os.environ["RANK"] == "1":
        sys.path[:0] = [packages] if packages else []
        time.sleep(late)
        if ends:
            return "ended"
    began = time.monotonic()
    try:
        with process_group(minutes):
            return "met"
    except SharedError as error:
        return str(error)
    except SystemExit as error:
        return f"status {error.code} within {time.monotonic() - began < 30}"


def test_ranks_that_run_on_the_same_meet() -> None:
    assert run_ranks(2, meeting) == ["met", "met"]


def test_a_rank_with_another_version(tmp_path: Path) -> None:
    record = tmp_path / "megatron_core-9.8.7.dist-info" / "METADATA"
    record.parent.mkdir()
    record.write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 9.8.7\n")
    said = run_ranks(3, meeting, str(tmp_path))
    assert len(set(said)) == 1 and said[0].startswith("Megatron-Core: rank 1 on ")
    assert " has 9.8.7, rank 0 on " in said[0] and said[0].endswith(": all ranks need the same")


def test_a_rank_on_another_device(tmp_path: Path, data: dict[str, str]) -> None:
    """The whole command: one line, which without a launcher each rank says, and exit status 2."""
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    first, other = training(run_file, before=another_device_on_rank_1).to_their_ends(2, timeout=40)
    assert first.returncode == other.returncode == 2
    assert first.stderr.startswith("error: device: rank 1 on ") and "has NVIDIA H100, rank 0 on" in first.stderr
    assert first.stderr.count("\n") == 1 and other.stderr.endswith(first.stderr)


def another_device_on_rank_1() -> None:
    from jetmoe_megatron.runtime import meeting
    from jetmoe_megatron.runtime.machine import this_machine

    if os.environ["RANK"] == "1":
        own = replace(this_machine(), device="NVIDIA H100")
        patch.object(meeting, "this_machine", lambda: own).start()


def test_a_rank_that_does_not_come_is_named(capfd) -> None:  # type: ignore[no-untyped-def]
    said = run_ranks(3, meeting, "", 0.0, True, 0.05)
    assert said == ["status 4 within True", "ended", "status 4 within True"]
    assert "error: rank 1 of 3 did not come in 0.05 minutes" in capfd.readouterr().err


def test_a_rank_that_comes_late_is_waited_for() -> None:
    assert run_ranks(2, meeting, "", 2.0) == ["met", "met"]


RESTARTED = """
import os, torch
from jetmoe_megatron.runtime.device import process_group

with process_group(0.5):
    torch.distributed.all_reduce(torch.ones(1))
    store, own = torch.distributed.distributed_c10d._get_default_store(), "left by " + os.environ["RANK"]
    assert not store.check([own])
    store.set(own, "")
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os._exit(5)
    torch.distributed.barrier()
print("met again")
"""


def test_ranks_that_a_launcher_starts_again(tmp_path: Path) -> None:
    """It keeps the rendezvous store, with the addresses of the ranks before them."""
    (tmp_path / "script.py").write_text(RESTARTED)
    options = ("--nproc-per-node=2", "--max-restarts=1")
    ended = command(sys.executable, *ELASTIC, *options, tmp_path / "script.py", timeout=120)
    assert ended.returncode == 0 and ended.stdout.count("met again") == 2, ended.stderr
