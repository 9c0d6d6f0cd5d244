"""How long a step waits for its data: 32 micro-batches of one sequence, 5 ms to read each, 2 s of computing a step.

    python -m benchmarks.data_loader [--record]

Compares the trainer's loader, with the readers that it has on a GPU, with torch's DataLoader with the same number of
workers and its own default of 2 micro-batches that each reads ahead. The reading and the computing are sleep: the
figures are what the loaders take.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.provenance import provenance
from jetmoe_megatron.data.sequences import Sample
from jetmoe_megatron.data.step_batches import READERS_ON_GPU, StepBatches

RESULT = Path(__file__).parent / "results" / "data_loader.md"
MICRO_BATCHES, LENGTH = 32, 4096
READ, COMPUTE = 0.005, 2.0  # seconds
STEPS = 9


class SlowSamples(Dataset[Sample]):
    """With the tensors of a sample of training."""

    def __len__(self) -> int:
        return MICRO_BATCHES * STEPS

    def __getitem__(self, number: int) -> Sample:
        time.sleep(READ)
        tokens = torch.full((LENGTH,), number)
        return {"tokens": tokens, "labels": tokens, "loss_mask": tokens.float(), "position_ids": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    rows = [row(name, waits(build)) for name, build in LOADERS.items()]
    table = "\n".join(["| loader | first step | later steps, median | later steps, most |", "|---|---|---|---|", *rows])
    print(table)
    if arguments.record:
        RESULT.write_text(REPORT.format(provenance=provenance(), table=table))


def ours() -> Iterator[Any]:
    return iter(StepBatches(SlowSamples(), range(STEPS), MICRO_BATCHES, 1, 1, 0, readers=READERS_ON_GPU))


def torchs() -> Iterator[Any]:
    micro_batches = iter(DataLoader(SlowSamples(), num_workers=READERS_ON_GPU, multiprocessing_context="fork"))
    for _ in range(STEPS):
        yield list(itertools.islice(micro_batches, MICRO_BATCHES))


LOADERS: dict[str, Callable[[], Iterator[Any]]] = {"this trainer's": ours, "torch's defaults": torchs}


def waits(build: Callable[[], Iterator[Any]]) -> list[float]:
    """Seconds that each step waits."""
    steps, waited = build(), []
    for step in range(STEPS):
        started = time.perf_counter()
        batches = next(steps)
        waited.append(time.perf_counter() - started)
        assert [int(batch["tokens"][0, 0]) for batch in batches] == [step * MICRO_BATCHES + i for i in range(32)]
        time.sleep(COMPUTE)
    return waited


def row(name: str, waited: list[float]) -> str:
    first, *later = (
        f"{1000 * seconds:.1f} ms" for seconds in (waited[0], statistics.median(waited[1:]), max(waited[1:]))
    )
    return " | ".join([f"| {name}", first, *later]) + " |"


REPORT = """# How long a step waits for its data

`python -m benchmarks.data_loader --record`: {provenance}

32 micro-batches of one sequence a step; reading a sequence takes 5 ms and computing a step 2 s, both of them sleep.

{table}
"""

if __name__ == "__main__":
    main()
