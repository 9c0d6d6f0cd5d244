"""When a job starts again by itself, and without which nodes."""

from __future__ import annotations

import pytest

from jetmoe_megatron.launch.comes_back import Decision, decide
from jetmoe_megatron.launch.starts import Start
from jetmoe_megatron.stopping import ExitStatus

NODES = ["n1", "n2", "n3"]


def decided(status: int, *tokens: int, now: int, cancelled: bool = False, failed: str = "") -> Decision:
    """tokens: of the newest checkpoint at each start of the job."""
    starts = [Start(f"7-{number}", "", at, NODES) for number, at in enumerate(tokens)]
    return decide(status, cancelled, now, starts, dict.fromkeys(failed.split(), "rank 3 was killed"), most=3)


@pytest.mark.parametrize("status", [*ExitStatus, 7, 134, 137, 138, 139, 143, 255])
@pytest.mark.parametrize("now", [100, 200])
def test_only_some_statuses_end_a_job(status: int, now: int) -> None:
    assert decided(status, 100, now=now).again == (status not in (0, 2, 3))


@pytest.mark.parametrize("status", [*ExitStatus, 137])
def test_a_cancelled_job_stays_cancelled(status: int) -> None:
    assert not decided(status, 0, now=100, cancelled=True).again


@pytest.mark.parametrize(
    ("tokens", "now", "again"),
    [
        ((0,), 0, True),
        ((0, 0), 0, True),
        ((0, 0, 0), 0, False),
        ((0, 0, 0), 100, True),  # the third start saved one
        ((0, 0, 100, 100, 100), 100, False),
        ((0, 100, 100), 100, True),
        ((100, 100, 100), 50, True),  # a rollback took checkpoints away
    ],
)
@pytest.mark.parametrize("status", [137, ExitStatus.RUN_ME_AGAIN])
def test_starts_without_progress_are_limited(tokens: tuple[int, ...], now: int, again: bool, status: int) -> None:
    assert decided(status, *tokens, now=now).again == again


@pytest.mark.parametrize(("failed", "left_out"), [("", []), ("n2", ["n2"]), ("n3 n1", ["n1", "n3"]), ("n1 n2 n3", [])])
def test_nodes_that_failed_are_left_out_unless_all_did(failed: str, left_out: list[str]) -> None:
    assert decided(137, 0, now=0, failed=failed).leave_out == left_out
    assert decided(137, 0, now=9, failed=failed).leave_out == left_out


def test_a_job_that_slurm_itself_has_queued_again() -> None:
    decision = decide(75, False, 0, [Start("7-0", "", 0, NODES)] * 9, {}, most=3, requeued=True)
    assert decision.again and decision.reason.endswith("; SLURM itself has queued it again, as after a preemption")
    assert decide(2, False, 0, [Start("7-0", "", 0, NODES)], {}, most=3, requeued=True).again  # and fails again
    assert decide(0, True, 9, [Start("7-0", "", 0, NODES)], {}, most=3).reason == "the run is done (status 0)"


def test_the_line_says_what_happened_and_what_follows() -> None:
    assert decided(137, 0, now=4096, failed="n2").reason == (
        "signal 9 ended a rank (status 137); n2: rank 3 was killed; it starts again, from 4,096 tokens"
    )
    assert decided(0, 0, now=9).reason == "the run is done (status 0)"
    assert decided(2, 0, now=0).reason == "wrong usage or input (status 2): change what the `error: ` line says"


def test_a_job_of_one_node_tries_another() -> None:
    starts = [Start("7-0", "", 0, ["n1"])]
    assert decide(137, False, 0, starts, {"n1": "rank 0 was killed"}, most=3).leave_out == ["n1"]
