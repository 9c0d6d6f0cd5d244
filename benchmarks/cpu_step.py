"""A training step on a CPU: ours, `transformers`' JetMoE with torch's AdamW, and our layers in a bare loop.

    python -m benchmarks.cpu_step [--threads 2] [--rounds 7] [--tiny] [--record]

All have the same shapes, batch and threads. Each runs in a separate process, as its users run it. They take turns step
by step, so that other work on the machine affects all of them. GFLOP/s count matmuls (config/flops.py). `--record`
writes the tables to benchmarks/results/cpu_step.md.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_kernels import OURS, attention_step
from benchmarks.contestants import Step, bare_step, hugging_face_step, our_step, run_of, world_of_one
from benchmarks.kernels import breakdown
from benchmarks.provenance import provenance
from jetmoe_megatron.config.flops import step_flops
from jetmoe_megatron.config.schema import Run

RESULT = Path(__file__).parent / "results/cpu_step.md"
SHAPE = {
    "num_layers": 4,
    "hidden_size": 512,
    "num_kv_heads": 8,
    "kv_channels": 64,
    "ffn_hidden_size": 1408,
    "vocab_size": 8192,
}
CONTESTANTS: dict[str, Callable[[Run], Step]] = {
    "transformers": hugging_face_step,
    "transformers, tuned": hugging_face_step,
    "ours": our_step,
    "bare": bare_step,
}
ATTENTION_ROUNDS = 9
WARM_UP = 3  # steps: the first ones allocate the memory that is then kept
TINY = {**SHAPE, "num_layers": 1, "hidden_size": 32, "num_kv_heads": 2, "kv_channels": 8, "ffn_hidden_size": 48}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, only to test the code")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape, length = (TINY, 32) if arguments.tiny else (SHAPE, 512)
    rows = [
        "| precision | step | seconds | tokens/s | GFLOP/s | times transformers' rate |",
        "|---|---|---|---|---|---|",
    ]
    part_rows = ["| precision | part of our step | share |", "|---|---|---|"]
    attention_rows = [
        "| precision | tokens of a sequence | torch's kernel, ms | ours, ms | ratio |",
        "|---|---|---|---|---|",
    ]
    for precision in ("fp32", "bf16"):
        steps, parts, attention = measure(run_of(shape, precision, length, sequences=4), arguments.rounds)
        rows += steps
        part_rows += parts
        attention_rows += attention
    table = "\n".join([*rows, "", *part_rows, "", *attention_rows])
    print(table)
    if arguments.record:
        RESULT.write_text(record(table, arguments))
    return 0


def measure(run: Run, rounds: int) -> tuple[list[str], list[str], list[str]]:
    """Rows of three tables: the median of each contestant, the parts of our step, attention alone."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    matmul_rates: list[float] = []
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, run)) for name in CONTESTANTS}
        for number in range(rounds + WARM_UP):
            for name, worker in workers.items():
                taken = worker.ask("step")
                if number >= WARM_UP:
                    seconds[name].append(taken)
            matmul_rates.append(workers["ours"].ask("matmul"))
        parts = workers["ours"].ask("breakdown")
        attention = workers["ours"].ask("attention")
    typical = {name: statistics.median(times) for name, times in seconds.items()}
    rate = statistics.median(matmul_rates)
    flops = step_flops(run.model, run.batch.sequence_length, run.batch.global_tokens).with_attention
    step_rows = [
        f"| {run.precision} | {name} | {time_:.3f} | {run.batch.global_tokens / time_:,.0f} | "
        f"{flops / time_ / 1e9:,.0f} | {typical['transformers'] / time_:.2f} |"
        for name, time_ in typical.items()
    ]
    step_rows.append(f"| {run.precision} | matmul | | | {rate / 1e9:,.0f} | |")
    total = sum(time_ for _, time_ in parts)
    part_rows = [f"| {run.precision} | {part} | {time_ / total:.0%} |" for part, time_ in parts]
    attention_rows = [
        f"| {run.precision} | {length} | {1e3 * torchs:.1f} | {1e3 * ours:.1f} | {torchs / ours:.2f} |"
        for length, torchs, ours in attention
    ]
    return step_rows, part_rows, attention_rows


class Worker:
    """One contestant in a separate process, which takes a step on request."""

    def __init__(self, name: str, run: Run) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(end, name, run, torch.get_num_threads()), daemon=True)

    def __enter__(self) -> Worker:
        self.process.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.join()

    def ask(self, what: str) -> Any:
        self.pipe.send(what)
        return self.pipe.recv()


def _serve(pipe: Connection, name: str, run: Run, threads: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    # The context also makes training's choices of memory and matmul library, which plain `transformers` runs without.
    with contextlib.nullcontext() if name == "transformers" else world_of_one():
        step = CONTESTANTS[name](run)
        answers = {
            "step": lambda: seconds_of(step),
            "breakdown": lambda: breakdown(step),
            "attention": lambda: attention_times(run),
            "matmul": lambda: rate_of(run),
        }
        while True:
            pipe.send(answers[pipe.recv()]())


def seconds_of(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def rate_of(run: Run) -> float:
    """FLOP/s of a plain matmul."""
    size, times = (64, 1) if run.model.num_layers == 1 else (2048, 4)
    a = torch.randn(size, size, dtype=torch.bfloat16 if run.precision == "bf16" else torch.float32)
    return times * 2 * size**3 / seconds_of(lambda: [a @ a for _ in range(times)])


def attention_times(run: Run) -> list[tuple[int, float, float]]:
    """(tokens of a sequence, seconds of torch's kernel, seconds of ours): a step's tokens in few or many sequences."""
    result = []
    for length in (run.batch.sequence_length // 4, run.batch.sequence_length, run.batch.sequence_length * 4):
        other = run_of(run.model.model_dump(), run.precision, length, run.batch.global_tokens // length)
        seconds: dict[str, list[float]] = {"flash": [], OURS: []}
        for _ in range(ATTENTION_ROUNDS):
            for name, times in seconds.items():
                times.append(seconds_of(attention_step(name, other)))
        result.append((length, statistics.median(seconds["flash"]), statistics.median(seconds[OURS])))
    return result


def record(table: str, arguments: argparse.Namespace) -> str:
    command = f"python -m benchmarks.cpu_step --threads {arguments.threads} --rounds {arguments.rounds}"
    shape = ", ".join(f"{key} {value}" for key, value in SHAPE.items())
    return (
        "# A training step on a CPU\n\n"
        f"`{command}`, {provenance()}.\n\n"
        f"{shape}, 8 experts, top 2,\n4 sequences of 512 tokens; each in a process of its own, one step each in turn, "
        f"the median of {arguments.rounds}.\n"
        "`ours` is all that the training loop does in a step. `bare` is our model with torch's AdamW on its weights:\n"
        "no schedule, no gradient buffers, in bf16 no fp32 copies of weights and gradients. `tuned`: with the memory\n"
        "and the matmul library that training chooses for its process. `matmul` is a plain one of 2048 x 2048 x 2048\n"
        "by that library. The parts of our step are by torch's profiler, which slows what is short.\n"
        "Attention alone is that of one layer, forward and backward, over the same tokens.\n\n" + table + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
