"""The page of a plan: whole, safe, and with all that the plan says."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.drawings import memory_parts
from jetmoe_megatron.plan.estimate import bytes_needed, estimate
from jetmoe_megatron.plan.page import page
from jetmoe_megatron.plan.plan import Plan
from jetmoe_megatron.plan.rehearsal import Memory
from jetmoe_megatron.plan.tables import NO_MEASUREMENT
from jetmoe_megatron.plan.text import text
from tests.parallel.test_equal_to_one_process import run_tree
from tests.plan.test_estimate import HARDWARE, kernels, rehearsal, transfers
from tests.support import REPO

WORK = [
    kernels(flops=10**12, number=8),
    kernels(flops=2 * 10**12, number=8, direction="backward"),
    kernels(flops=10**12, number=8, direction="recompute"),
    kernels("optimizer", flops=10**11, direction="update"),
]
SENT = [transfers("reduce_scatter_tensor", [0, 1], 10**9, "EXPERT_DATA_PARALLEL_GROUP", "reduction")]
PASS = re.compile(r"(forward|backward), micro-batch (\d+)(?:, chunk (\d+))?: ")


def planned(pipeline: int = 2, micro_batches: int = 8, hardware: Any = HARDWARE, **parallel: Any) -> Plan:
    tree = run_tree(parallel={"pipeline": pipeline, **parallel}, batch__micro_sequences=1)
    chunks = parallel.get("virtual_pipeline", 1)
    tree["model"]["num_layers"] = pipeline * chunks
    tree["batch"]["global_tokens"] = micro_batches * tree["batch"]["sequence_length"]
    run = Run.model_validate(tree)
    layout = resolve_layout(run, pipeline)
    assert layout.micro_batches == micro_batches
    work = [replace(one, chunk=chunk) for one in WORK for chunk in range(chunks)]
    more: dict[str, Any] = {"micro_batches": micro_batches, "kernels": work, "transfers": SENT}
    world = [rehearsal(stage, stage, **more) for stage in range(pipeline)]
    return Plan(run, layout, hardware, 1.0, world, estimate(run, layout, hardware, world))


def drawn(plan: Plan) -> list[list[tuple[str, int, int]]]:
    """The passes of each stage: direction, chunk, micro-batch."""
    tree = ElementTree.fromstring(page(plan))
    lanes: dict[float, list[tuple[str, int, int]]] = {}
    for group in tree.iter("g"):
        match = PASS.match(group.findtext("title") or "")
        if match:
            top = float(group.findall("rect")[0].attrib["y"])
            lanes.setdefault(top, []).append((match[1], int(match[3] or 0), int(match[2])))
    return [lanes[top] for top in sorted(lanes)]


def passes(plan: Plan) -> list[list[tuple[str, int, int]]]:
    return [
        [(span.direction, span.chunk, span.micro_batch) for span in own if span.direction in ("forward", "backward")]
        for own in plan.estimate.timeline
    ]


def test_it_loads_nothing() -> None:
    found = page(planned())
    for word in ("http", "src=", "href", "@import", "url(", "<script", "<link", "<img"):
        assert word not in found
    assert found.count("<svg") == 1


def test_it_says_that_nothing_is_measured() -> None:
    assert NO_MEASUREMENT in page(planned())


def test_a_name_cannot_become_markup() -> None:
    plan = planned()
    named = Plan(
        plan.run.model_copy(update={"name": "<script>alert('&')</script>\x1b[2J"}),
        plan.layout,
        HARDWARE.model_copy(update={"gpu": '"><img src=x>'}),
        plan.imbalance,
        plan.world,
        plan.estimate,
    )
    found = page(named)
    assert "<script" not in found and "<img" not in found and "\x1b" not in found
    assert "&lt;script&gt;" in found
    assert ElementTree.fromstring(found).findtext("head/title") == (
        "Plan: <script>alert('&')</script>\\x1b[2J on 2 \"><img src=x>"
    )


@pytest.mark.parametrize(
    ("peak", "in_update"),
    [
        ({"weights": 2 * 10**9, "activations": 3 * 10**9}, {"weights": 2 * 10**9}),
        ({"weights": 2 * 10**9}, {"weights": 2 * 10**9, "optimizer state": 4 * 10**9}),
        ({"weights": 10**11}, {}),  # more than the GPU has
    ],
)
def test_bars_add_up_to_what_is_needed(peak: dict[str, int], in_update: dict[str, int]) -> None:
    plan = planned()
    one = rehearsal(memory=Memory({}, peak, in_update, in_update))
    needed = bytes_needed(HARDWARE, one)
    assert sum(memory_parts(HARDWARE, one).values()) == pytest.approx(needed)
    only = Plan(plan.run, plan.layout, HARDWARE, 1.0, [one], plan.estimate)
    tree = ElementTree.fromstring(page(only))
    widths = [part.attrib["style"] for bar in tree.iter("div") if bar.get("class") == "parts" for part in bar]
    shares = sum(float(width.removeprefix("width:").removesuffix("%")) for width in widths)
    assert shares == pytest.approx(100 * needed / max(needed, 80e9), abs=0.01)
    limits = [span for span in tree.iter("span") if span.get("class") == "limit"]
    assert len(limits) == (needed > 80e9)
    assert ("too little" in page(only)) == (needed > 80e9)


@pytest.mark.parametrize(
    ("pipeline", "parallel"), [(1, {}), (2, {}), (4, {"overlap_grad_reduce": True}), (2, {"virtual_pipeline": 2})]
)
def test_each_pass_of_each_stage_is_drawn(pipeline: int, parallel: dict[str, Any]) -> None:
    plan = planned(pipeline, **parallel)
    assert drawn(plan) == passes(plan)


def test_of_a_long_step_the_middle_is_left_out_and_counted() -> None:
    plan = planned(4, 128)
    found = drawn(plan)
    for own, every in zip(found, passes(plan), strict=True):
        assert len(own) < 60
        head = next(n for n in range(len(own)) if own[n] != every[n])
        assert own[head:] == every[head - len(own) :]
    left_out = len(passes(plan)[0]) - len(found[0])
    assert f"{left_out} passes of" in page(plan)


def test_a_page_stays_small() -> None:
    plan = planned(32, 128, virtual_pipeline=2)
    assert len(page(plan)) < 500_000
    assert len(drawn(plan)) == 32


def test_groups_have_names_that_a_user_knows() -> None:
    plan = planned()
    for found in (page(plan), text(plan)):
        assert "expert data parallel" in found
        assert "PARALLEL_GROUP" not in found


def jetmoe_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jetmoe_megatron.cli", "plan", "configs/quickstart/run.yaml", "--hardware", "h100"]
    return subprocess.run([*command, *arguments], cwd=REPO, capture_output=True, text=True, timeout=240, check=False)


def test_the_command_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    done = jetmoe_plan("--gpus", "1", "--html", str(file))
    assert done.returncode == 0, done.stderr
    assert f"written: {file}" in done.stdout
    ElementTree.fromstring(file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--gpus", "1", "--search"), "--html: writes one plan, without --search, --fit and --compare"),
        (("--gpus", "1..2"), "--gpus: name one number with --search, --compare, --json and --html"),
    ],
)
def test_it_is_of_one_plan(tmp_path: Path, arguments: tuple[str, ...], error: str) -> None:
    done = jetmoe_plan(*arguments, "--html", str(tmp_path / "plan.html"))
    assert done.returncode == 2
    assert error in done.stderr
    assert not list(tmp_path.iterdir())
