"""How long a step waits for its data: 32 micro-batches of one sequence, 5 ms to read each, 2 s of computing a step.

    python -m benchmarks.data_loader [--record]

Compares the trainer's loader, with the readers that it has on a GPU, with torch's DataLoader with the same number of
workers and its own default of 2 micro-batches that each reads ahead, and with steps that are in memory already: the
same lines of Python, and nothing to wait for. Reading sleeps and computing keeps a core busy:
the figures are what the loaders take. Without a GPU, torch's thread that copies what was read to pinned memory still
runs, and copies to other memory.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

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
    with as_on_a_gpu():
        rows = [row(name, waits(build)) for name, build in LOADERS.items()]
    table = "\n".join(["| loader | first step | later steps, median | later steps, most |", "|---|---|---|---|", *rows])
    print(table)
    if arguments.record:
        RESULT.write_text(REPORT.format(provenance=provenance(), table=table))


def as_on_a_gpu() -> AbstractContextManager[Any]:
    """torch takes steps from the readers in a thread only if it finds an accelerator."""
    stack = ExitStack()
    if not torch.cuda.is_available():
        for name, answer in {
            "torch.cuda.is_available": True,
            "torch.accelerator.is_available": True,
            "torch.accelerator.current_accelerator": torch.device("cpu"),
            "torch.accelerator.current_device_index": 0,
            "torch.accelerator.set_device_index": None,
        }.items():
            stack.enter_context(patch(name, lambda *_, answer=answer: answer))
        stack.enter_context(patch("torch.Tensor.pin_memory", torch.Tensor.clone))
    return stack


def ours() -> Iterator[Any]:
    return iter(StepBatches(SlowSamples(), range(STEPS), MICRO_BATCHES, 1, 1, 0, readers=READERS_ON_GPU))


def in_memory() -> Iterator[Any]:
    """The least that any loader can take here: after two seconds of other work, the first lines of torch are slow."""
    batches = StepBatches(SlowSamples(), range(STEPS), MICRO_BATCHES, 1, 1, 0, readers=0)
    batches.loader = DataLoader(cast("Dataset[Sample]", list(batches.loader)), batch_size=None)
    return iter(batches)


def torchs() -> Iterator[Any]:
    micro_batches = iter(
        DataLoader(SlowSamples(), num_workers=READERS_ON_GPU, multiprocessing_context="fork", pin_memory=True)
    )
    for _ in range(STEPS):
        yield list(itertools.islice(micro_batches, MICRO_BATCHES))


LOADERS: dict[str, Callable[[], Iterator[Any]]] = {
    "none: the steps are in memory": in_memory,
    "this trainer's": ours,
    "torch's defaults": torchs,
}


def waits(build: Callable[[], Iterator[Any]]) -> list[float]:
    """Seconds that each step waits."""
    steps, waited = build(), []
    for step in range(STEPS):
        started = time.perf_counter()
        batches = next(steps)
        waited.append(time.perf_counter() - started)
        assert [int(batch["tokens"][0, 0]) for batch in batches] == [step * MICRO_BATCHES + i for i in range(32)]
        while time.perf_counter() < started + waited[-1] + COMPUTE:
            pass
    return waited


def row(name: str, waited: list[float]) -> str:
    first, *later = (
        f"{1000 * seconds:.1f} ms" for seconds in (waited[0], statistics.median(waited[1:]), max(waited[1:]))
    )
    return " | ".join([f"| {name}", first, *later]) + " |"


REPORT = """# How long a step waits for its data

`python -m benchmarks.data_loader --record`: {provenance}

32 micro-batches of one sequence a step; reading a sequence takes 5 ms (sleep) and computing a step 2 s (a busy core).
Nobody waits if the trainer's steps take no longer than steps that are in memory.

{table}
"""

if __name__ == "__main__":
    main()
