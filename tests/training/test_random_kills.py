"""Runs whose ranks are killed again and again, all at once, and what they compute in the end."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from jetmoe_megatron.checkpoint.checksums import find_damage
from jetmoe_megatron.checkpoint.folder import published
from jetmoe_megatron.convert.verify import compare_tensors
from jetmoe_megatron.monitor.jsonl import read_metrics
from tests.support import computed, losses, pretrain, small_run, training, write_run

STEPS, SAVE_EVERY = 48, 2
UNFINISHED = ".partial-"  # in the name of a checkpoint that is being written
LIMIT = 240  # seconds for a run to reach the moment of its kill

# kills, ranks, parallel: 20 kills in all
RUNS: dict[str, tuple[int, int, dict[str, int]]] = {
    "data": (3, 2, {}),
    "one": (6, 1, {}),
    "tensor": (4, 2, {"tensor": 2}),
    "expert, pipeline": (5, 4, {"expert": 2, "pipeline": 2}),
    "tensor, pipeline, expert": (2, 8, {"tensor": 2, "pipeline": 2, "expert": 2}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if RUNS[n][1] > 2 else ()) for n in RUNS])
def test_killed_runs_compute_the_same_to_the_bit(name: str, tmp_path: Path, data: dict[str, str]) -> None:
    """Every step's numbers, of all the starts, and the weights at the end."""
    kills, ranks, parallel = RUNS[name]
    changes: dict[str, Any] = {"parallel": parallel, "checkpoint__every_tokens": SAVE_EVERY * 256}
    changes["phases__0__tokens"] = (STEPS - 3) * 256
    files = {f: write_run(tmp_path / f, small_run(tmp_path / f, data, **changes)) for f in ("whole", "killed")}
    assert pretrain(ranks, files["whole"]).returncode == 0
    whole, killed = (tmp_path / f / "run" for f in files)
    chance, saved = random.Random(name), [Path("tokens_0")]
    for kill in range(kills):
        start_and_kill(files["killed"], ranks, STEPS * (kill + 1) // (kills + 1), chance)
        done = computed(read_metrics(killed / "metrics.jsonl"))  # whose last line may be cut off
        assert done == losses(whole)[: len(done)]
        before, saved = saved[-1], published(killed / "checkpoints")
        assert tokens(before) <= tokens(saved[-1]) and len(done) * 256 - tokens(saved[-1]) <= 4 * SAVE_EVERY * 256
        assert all(find_damage(path) is None for path in saved)
    ended = pretrain(ranks, files["killed"])
    assert ended.returncode == 0, ended.stderr
    assert losses(killed) == losses(whole)
    last, other = (published(folder / "checkpoints")[-1] for folder in (whole, killed))
    assert compare_tensors(last, other).different == 0
    assert not any(UNFINISHED in path.name for path in (killed / "checkpoints").iterdir())


def start_and_kill(run_file: Path, ranks: int, step: int, chance: random.Random) -> None:
    """At a random moment after `step`: about half of them while a checkpoint is being written."""
    with training(run_file).following(ranks) as run:
        folder = run_file.parent / "run"
        metrics, deadline = folder / "metrics.jsonl", time.monotonic() + LIMIT

        def goes_on() -> bool:
            return all(process.is_alive() for process in run.processes) and time.monotonic() < deadline

        try:
            while not metrics.is_file() or len(metrics.read_bytes().splitlines()) < step:
                assert goes_on()
                time.sleep(0.005)
            if chance.random() < 0.5:
                while not any(UNFINISHED in path.name for path in (folder / "checkpoints").iterdir()):
                    assert goes_on()
                time.sleep(chance.uniform(0, 0.05))
            else:
                time.sleep(chance.uniform(0, 0.1))
            assert goes_on()
        finally:
            kill_ranks([process.pid for process in run.processes])


def tokens(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("tokens_"))


def kill_ranks(ranks: list[int]) -> None:
    """What they have forked goes with them."""
    processes = [psutil.Process(rank) for rank in ranks]
    everything = [*processes, *(child for process in processes for child in process.children(recursive=True))]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(everything, timeout=20)
    assert not alive
