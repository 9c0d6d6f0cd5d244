"""What the rehearsal of a rank's step found. It can be saved as JSON, and all else that a plan says is read from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kernels:
    """Operations that are the same but for when they run."""

    part: str  # of the model
    direction: str  # forward, recompute or backward; reduction or update outside of passes
    chunk: int  # of the model's chunks on the rank, which are its virtual stages; 0 outside of passes
    name: str
    shapes: str  # of the tensors that it reads
    number: int
    flops: int  # of one
    bytes: int  # that one reads and writes


@dataclass(frozen=True)
class Transfers:
    """Collectives or messages that are the same but for when they run."""

    direction: str  # as of kernels; message: between passes
    chunk: int
    group: str
    ranks: list[int]  # of the world
    kind: str
    dtype: str
    elements: int  # of the tensor that this rank gives, or gets if it gives none
    bytes: int
    number: int


@dataclass(frozen=True)
class Waits:
    """The host waits for the device."""

    direction: str  # as of kernels
    chunk: int
    place: str  # in the program
    number: int


@dataclass(frozen=True)
class Memory:
    """In bytes. Between steps a rank holds what `kept` says."""

    kept: dict[str, int]  # weights, gradients, main weights, optimizer state
    peak: dict[str, int]  # by part, when most is held
    peak_in_update: dict[str, int]  # the same while the optimizer updates the weights
    peak_in_save: dict[str, int]  # the same while a checkpoint is saved

    @property
    def most(self) -> dict[str, int]:
        """By part, when most is held at all."""
        return max(self.peak, self.peak_in_update, self.peak_in_save, key=lambda sizes: sum(sizes.values()))


@dataclass(frozen=True)
class Rehearsal:
    rank: int
    world: int
    device: str  # gpu or cpu: whose ways of computing were taken
    place: dict[str, int]  # number of the rank in each kind of group
    micro_batches: int
    parameters: int
    imbalance: float
    memory: Memory
    kernels: list[Kernels] = field(repr=False)
    transfers: list[Transfers] = field(repr=False)
    host_waits: list[Waits] = field(repr=False)

    def flops(self, by: Callable[[Kernels], str] = lambda kernels: kernels.part) -> dict[str, int]:
        """Floating-point operations of the step's matmuls and attention, by part of the model."""
        found: dict[str, int] = {}
        for kernels in self.kernels:
            if kernels.flops:
                found[by(kernels)] = found.get(by(kernels), 0) + kernels.number * kernels.flops
        return found

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Rehearsal:
        tree: dict[str, Any] = json.loads(text)
        return cls(
            **{
                **tree,
                "memory": Memory(**tree["memory"]),
                "kernels": [Kernels(**entry) for entry in tree["kernels"]],
                "transfers": [Transfers(**entry) for entry in tree["transfers"]],
                "host_waits": [Waits(**entry) for entry in tree["host_waits"]],
            }
        )
