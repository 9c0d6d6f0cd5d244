"""A long run uses no more memory, files, threads or processes at its end than near its beginning."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from jetmoe_megatron.monitor.jsonl import read_metrics
from tests.support import REPO, TORCHRUN, environment, small_run, write_run

STEPS, FROM = 2000, 500  # what is compared with: by then all that is built once is there
GROWTH = 0.02


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path, data: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks that save every 50 steps and measure the held-out loss every 100."""
    changes = {"checkpoint": {"every_tokens": 50 * 256, "keep_last": 2}, "phases__0__tokens": (STEPS - 3) * 256}
    changes["evaluation"] = {"every_steps": 100, "sequences": 8, "data": [{"name": "v", "path": data["held_out"]}]}
    run_file = write_run(tmp_path, small_run(tmp_path, data, **changes))
    process = subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node=2", "pretrain_jetmoe.py", str(run_file)],
        cwd=REPO,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    used: dict[int, list[tuple[int, int, int]]] = {}
    try:
        deadline = time.monotonic() + 1800
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            step = len(read_metrics(tmp_path / "run/metrics.jsonl"))
            is_saving = not 10 < step % 50 < 45
            if step >= FROM and not is_saving and step // 250 not in {s // 250 for s in used}:
                used[step] = [usage(pid) for pid in children(process.pid)]
        assert process.wait(60) == 0, process.stderr and process.stderr.read()
    finally:
        process.kill()
    with capsys.disabled():
        for step, ranks in used.items():
            print(
                f"\nstep {step}:",
                *(f"{kb / 1024:.1f} MiB, {files} files, {threads} threads;" for kb, files, threads in ranks),
                end="",
            )
    assert len(used) >= 5 and all(len(ranks) == 2 for ranks in used.values())
    (_, first), *_, (_, last) = sorted(used.items())
    for before, after in zip(first, last, strict=True):
        assert after[0] < before[0] * (1 + GROWTH)
        assert after[1:] == before[1:]


def children(pid: int) -> list[int]:
    return [int(n) for task in Path(f"/proc/{pid}/task").glob("*/children") for n in task.read_text().split()]


def usage(pid: int) -> tuple[int, int, int]:
    """Anonymous memory in KiB, open files, threads."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]), len(list((process / "fd").iterdir())), int(status["Threads"])
