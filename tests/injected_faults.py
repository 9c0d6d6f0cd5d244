"""Training in which a chosen rank fails at a chosen step. The package has no hooks for this: they are patched in here.

`pretrain_with` runs the real command; `install` serves a test that trains in its own processes.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from tests.support import REPO, command, training

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
ELASTIC = ("-m", "jetmoe_megatron.launch.elastic", "--standalone")  # keeps the exit status
_FAULTS = "TEST_FAULTS"

Kind = Literal[
    "kill",  # SIGKILL
    "raise",  # an error in the program
    "hang",
    "loss",  # times `factor`, NaN by default
    "gradient",  # NaN throughout one parameter's, before the ranks reduce it
    "reduced gradients",  # NaN on this rank alone, after
    "expert",  # NaN in all that one expert of the last layer puts out
]


@dataclass
class Fault:
    kind: Kind
    step: int  # from 1, as in metrics.jsonl
    rank: int = 0
    factor: float = float("nan")
    first: int = 1  # after a rollback a step comes again: the fault is in its first time,
    times: int = 1  # and in as many from there, counted in this process


def pretrain_with(
    faults: list[Fault],
    ranks: int,
    run_file: Path,
    *overrides: str,
    launcher: tuple[str, ...] = (),
    reads: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """The training command with faults.

    Args:
        launcher: the module that starts the ranks, with its options; default: none.
        reads: a folder that takes, rank by rank, which sequences were read.
    """
    if reads:
        reads.mkdir(parents=True, exist_ok=True)
    if not launcher:
        return training(run_file, *overrides, before=partial(prepare, faults, reads)).run(ranks)
    variables = {_FAULTS: json.dumps([asdict(fault) for fault in faults])}
    env = ["env", *(f"{name}={value}" for name, value in variables.items())]
    return command(*env, sys.executable, *launcher, f"--nproc-per-node={ranks}", "-m", __name__, run_file, *overrides)


def prepare(faults: list[Fault], reads: Path | None = None) -> None:
    """In the process that is to fail."""
    install(faults)
    if reads:
        log_reads(reads)


def sequences_read(reads: Path) -> list[tuple[str, int]]:
    """(path of a data set, number of a sequence) for each that any rank has read."""
    lines = [line for file in reads.iterdir() for line in file.read_text().splitlines()]
    return [(path, int(number)) for path, number in (line.rsplit(" ", 1) for line in lines)]


def install(faults: list[Fault]) -> None:
    """Let this process fail, wherever its rank is named."""
    from megatron.core.distributed import finalize_model_grads

    from jetmoe_megatron.data.step_batches import HeldOutSamples, StepBatches
    from jetmoe_megatron.model.experts.glu import GLUExperts
    from jetmoe_megatron.training import optimizer, step

    seen: list[int] = []  # the steps that were begun

    def now(*kinds: Kind) -> Iterator[Fault]:
        for fault in faults:
            here = fault.rank == int(os.environ.get("RANK", "0")) and seen[-1:] == [fault.step]
            if fault.kind in kinds and here and fault.first <= seen.count(fault.step) < fault.first + fault.times:
                yield fault

    def count_steps(original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @wraps(original)
        def iterate(batches: StepBatches) -> Iterator[Any]:
            if isinstance(batches.loader.dataset, HeldOutSamples):
                yield from original(batches)
                return
            sampler: Any = batches.loader.batch_sampler
            first = sampler.steps.start + 1
            for number, batch in enumerate(original(batches), first):
                seen.append(number)
                for fault in now("kill", "raise", "hang"):
                    _fail(fault)
                yield batch

        return iterate

    def spoil_loss(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def loss(*arguments: Any) -> Any:
            total, tokens, record = original(*arguments)
            for fault in now("loss"):
                total, record = total * fault.factor, record * record.new_tensor([fault.factor, 1.0])
            return total, tokens, record

        return loss

    def spoil_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def finalize(model: list[Any], *arguments: Any, **named: Any) -> Any:
            for _ in now("gradient"):
                next(model[0].parameters()).main_grad.fill_(float("nan"))
            result = original(model, *arguments, **named)
            for _ in now("reduced gradients"):
                for parameter in model[0].parameters():
                    parameter.main_grad.fill_(float("nan"))
            return result

        return finalize

    def spoil_expert(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def forward(experts: Any, x_ND: Any, count_E: Any, gate_N: Any) -> Any:
            y_ND, bias = original(experts, x_ND, count_E, gate_N)
            for _ in now("expert"):
                counts = count_E.tolist()
                expert = counts.index(max(counts))
                y_ND = y_ND.clone()
                y_ND[sum(counts[:expert]) : sum(counts[: expert + 1])] = float("nan")
            return y_ND, bias

        return forward

    StepBatches.__iter__ = count_steps(StepBatches.__iter__)  # type: ignore[method-assign]
    step._loss = spoil_loss(step._loss)
    patch.object(optimizer, "finalize_model_grads", spoil_gradients(finalize_model_grads)).start()
    GLUExperts.forward = spoil_expert(GLUExperts.forward)  # type: ignore[method-assign]


def log_reads(folder: Path) -> None:
    from jetmoe_megatron.data.sequences import Sequences

    original = Sequences.__getitem__
    with open(folder / f"rank{os.environ.get('RANK', '0')}", "a", buffering=1) as file:
        log = os.dup(file.fileno())

    def read(sequences: Sequences, number: int) -> Any:
        os.write(log, f"{sequences.path} {number}\n".encode())
        return original(sequences, number)

    Sequences.__getitem__ = read  # type: ignore[method-assign]


def _fail(fault: Fault) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "raise":
        raise RuntimeError("an error in the program")
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    prepare([Fault(**fault) for fault in json.loads(os.environ[_FAULTS])])
    runpy.run_path(str(REPO / "pretrain_jetmoe.py"), run_name="__main__")
