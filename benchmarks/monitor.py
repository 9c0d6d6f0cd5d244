"""What it costs to watch a run: the time in which a step's numbers are recorded, judged and written.

    python -m benchmarks.monitor [--threads 2] [--steps 40] [--tiny] [--record]

Takes the shapes of `benchmarks.cpu_step`. Each part is timed by a clock around the function that does it, in steps of
the real program on one rank; what reduces numbers over ranks then has no ranks to wait for.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.contestants import our_model, random_batch, run_of, world_of_one
from benchmarks.cpu_step import SHAPE, TINY, WARM_UP
from benchmarks.provenance import REPO, provenance
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model import router
from jetmoe_megatron.monitor.alarms import Alarms
from jetmoe_megatron.monitor.jsonl import MetricsLines, RouterLines
from jetmoe_megatron.monitor.memory_growth import MemoryGrowth
from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.runtime.memory import grown_memory
from jetmoe_megatron.training.metrics import reduce_metrics
from jetmoe_megatron.training.norms import Norms
from jetmoe_megatron.training.rank_speed import RankSpeed
from jetmoe_megatron.training.router_metrics import RouterSums
from jetmoe_megatron.training.step import compute_gradients, update_weights
from jetmoe_megatron.training.step_times import StepTimes

RESULT = REPO / "benchmarks/results/monitor.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="a multiple of logging.router_every_steps")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, only to test the code")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    rows = ["| precision | part | ms of a step | share of the step |", "|---|---|---|---|"]
    for precision in ("fp32", "bf16"):
        shape, length = (TINY, 32) if arguments.tiny else (SHAPE, 512)
        parts, step = measure(run_of(shape, precision, length, sequences=4), arguments.steps)
        parts["all"] = sum(parts.values())
        rows += [f"| {precision} | {name} | {1e3 * took:.3f} | {took / step:.3%} |" for name, took in parts.items()]
        rows.append(f"| {precision} | the step | {1e3 * step:.1f} | |")
    command = f"python -m benchmarks.monitor --threads {arguments.threads} --steps {arguments.steps}"
    text = f"""# What it costs to watch a run

`{command}`, {provenance()}, load {load:.1f} at the start.

The shapes are those of [cpu_step.md](cpu_step.md). A time is the mean over the steps; those of norms and of a line of
`routers.jsonl` are spread over the steps between two of them. How long collectives take between ranks is not measured.

""" + "\n".join(rows)
    print(text)
    if arguments.record:
        RESULT.write_text(text + "\n")
    return 0


def measure(run: Run, steps: int) -> tuple[dict[str, float], float]:
    """Seconds of each part and of a whole step, with the parts in it."""
    spent: dict[str, float] = defaultdict(float)
    with (
        world_of_one(),
        tempfile.TemporaryDirectory() as folder,
        timed(router, "entropy_and_margin", "entropy and margin of tokens", spent),
    ):
        model, optimizer = our_model(run)
        batch, sums, norms, alarms = random_batch(run), RouterSums(run, model), Norms(model, optimizer), Alarms(run)
        times, speed, growth = StepTimes(model), RankSpeed(model), MemoryGrowth()
        metrics_file = MetricsLines(Path(folder) / "metrics.jsonl", 0)
        routers_file = RouterLines(Path(folder) / "routers.jsonl", 0)
        for step in range(1, WARM_UP + steps + 1):
            if step == WARM_UP + 1:
                spent.clear()
                began = time.perf_counter()
            times.begin()
            losses, norm = compute_gradients(model, optimizer, [batch])
            of_parts = {}
            is_shown = (step - WARM_UP) % run.logging.router_every_steps == 0
            if is_shown:
                with part("norms", spent):
                    of_parts = norms.of_gradients()
            with part("sums of the routers", spent):
                sums.add_step()
            metrics, _ = reduce_metrics(model, losses, norm, data_wait=0.0, stop=False)
            update_weights(optimizer, norm, 1e-4)
            if is_shown:
                with part("norms", spent):
                    of_parts |= norms.of_update()
            record: Record = {"step": step, "step_seconds": 1.0, **metrics.dump(), **of_parts}
            with part("times and memory", spent):
                speed.seconds()
                record |= times.seconds()
                grown_memory()
                record |= growth.add(record)
            if sums.is_due(step - WARM_UP, last=False) and step > WARM_UP:
                with part("a line of routers.jsonl", spent):
                    record |= sums.record(step, step * run.batch.global_tokens)
                    routers_file.write(record)
            with part("alarms", spent):
                alarms.judge(record)
            with part("a line of metrics.jsonl", spent):
                metrics_file.write(record)
        whole = time.perf_counter() - began
        for file in (metrics_file, routers_file):
            file.close()
    return {name: took / steps for name, took in spent.items()}, whole / steps


@contextlib.contextmanager
def part(name: str, spent: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    spent[name] += time.perf_counter() - began


@contextlib.contextmanager
def timed(module: Any, name: str, what: str, spent: dict[str, float]) -> Iterator[None]:
    function: Callable[..., Any] = getattr(module, name)

    def call(*arguments: Any) -> Any:
        with part(what, spent):
            return function(*arguments)

    with patch.object(module, name, call):
        yield


if __name__ == "__main__":
    raise SystemExit(main())
