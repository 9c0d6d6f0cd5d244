"""Causal attention of one layer on a CPU, forward and backward: our matmuls over blocks of queries, and torch's kernel.

    python -m benchmarks.cpu_attention [--threads 2] [--rounds 15] [--tiny] [--record]

`model/attention_on_cpu.py` chooses between them by these figures. Each round runs both, one after the other, and gives
a ratio, so that other work on the machine affects both. `--record` adds this machine's table to
benchmarks/results/cpu_attention.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks.attention_kernels import BLOCKS, attention_step
from benchmarks.contestants import Step, run_of
from benchmarks.provenance import provenance
from jetmoe_megatron.runtime.matmul import choose_matmul, has_amx
from jetmoe_megatron.runtime.memory import keep_freed_memory

RESULT = Path(__file__).parent / "results/cpu_attention.md"
# Of the layer in benchmarks/cpu_step.py.
SHAPE = {
    "num_layers": 1,
    "hidden_size": 512,
    "num_kv_heads": 8,
    "kv_channels": 64,
    "ffn_hidden_size": 1408,
    "vocab_size": 8192,
}
LENGTHS, TOKENS = (128, 256, 512, 1024, 2048, 4096), 2048


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="a tiny length, only to test the code")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    keep_freed_memory()  # both as in training
    choose_matmul()
    rows = ["| precision | tokens of a sequence | torch's kernel, ms | ours, ms | ratio | quartiles |"]
    rows.append("|---|---|---|---|---|---|")
    for precision in ("fp32", "bf16"):
        for length in (16,) if arguments.tiny else LENGTHS:
            rows.append(measure(precision, length, arguments.rounds))
            print(rows[-1], flush=True)
    if arguments.record:
        before = RESULT.read_text() if RESULT.exists() else HEAD
        RESULT.write_text(before + section(arguments, rows))
    return 0


def measure(precision: str, length: int, rounds: int) -> str:
    """A row of the table. The ratio is torch's time by ours: above 1 ours is faster."""
    run = run_of(SHAPE, precision, length, max(1, TOKENS // length))
    theirs, ours = attention_step("flash", run), attention_step(BLOCKS, run)
    pairs = [(seconds_of(theirs), seconds_of(ours)) for _ in range(rounds + 2)][2:]
    ratios = [a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    times = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    shown = " | ".join(f"{ms:.1f}" for ms in times)
    return f"| {precision} | {length} | {shown} | {middle:.2f} | {low:.2f} to {high:.2f} |"


def seconds_of(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


HEAD = """# Causal attention on a CPU

One layer, forward and backward, over 2048 tokens (4096 in sequences of that length), 8 key-value heads of 64 channels,
two query heads for each. The ratio is torch's time by that of our matmuls over blocks: above 1 ours is faster. Each
round runs both, one after the other; medians of the rounds, and the quartiles of the ratio.
"""


def section(arguments: argparse.Namespace, rows: list[str]) -> str:
    command = f"python -m benchmarks.cpu_attention --threads {arguments.threads} --rounds {arguments.rounds}"
    cpu = f"{torch.backends.cpu.get_cpu_capability()} {'with' if has_amx() else 'without'} AMX"
    return "\n".join(["", f"## {cpu}", "", f"`{command}`, {provenance()}.", "", *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
