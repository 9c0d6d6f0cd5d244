"""What each rank finds out, as plain values that the ranks exchange."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from jetmoe_megatron.doctor.clocks import Offset
from jetmoe_megatron.doctor.disk import DiskRate
from jetmoe_megatron.doctor.nvidia_smi import GPU
from jetmoe_megatron.runtime.device import has_gpu

_Key = TypeVar("_Key")


@dataclass
class RankFacts:
    """
    Attributes:
        node: as the batch system names it.
        gpu: number on its node, and serial number and UUID if they are known; empty on a CPU.
        uuid: of the GPU, without the prefix `GPU-`.
        runs_on: versions and the like, by name, in which ranks must not differ.
        rates: by what was measured (`own_rates.py`).
        groups: by what was measured: the ranks of the group, and its rate (`group_rates.py`).
        pairs: by kind: the pairs of ranks and their rates (`pair_rates.py`).
        disk: of the first rank of each node, if there is a run folder.
        gpus: of the node, by its first rank; `no_gpus`: why they are not known.
    """

    rank: int
    node: str
    gpu: str = ""
    uuid: str = ""
    runs_on: dict[str, str] = field(default_factory=dict)
    clock: Offset | None = None
    rates: dict[str, float] = field(default_factory=dict)
    groups: dict[str, tuple[tuple[int, ...], float]] = field(default_factory=dict)
    pairs: dict[str, list[tuple[tuple[int, int], float]]] = field(default_factory=dict)
    disk: DiskRate | None = None
    gpus: list[GPU] = field(default_factory=list)
    no_gpus: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}{f', {self.gpu}' if self.gpu else ''}"


def gpu_of_rank() -> tuple[str, str]:
    """`gpu` and `uuid` of this rank's facts."""
    if not has_gpu():
        return "", ""
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return f"GPU {os.environ['LOCAL_RANK']} (GPU-{uuid})", uuid


def named_gpus(ranks: Sequence[RankFacts]) -> list[RankFacts]:
    """With the numbers and the serial numbers that nvidia-smi told the first rank of the node."""
    told = {gpu.uuid.removeprefix("GPU-"): gpu for rank in ranks for gpu in rank.gpus}
    return [
        replace(rank, gpu=f"GPU {gpu.index} ({f'serial {gpu.serial}, ' if gpu.serial else ''}{gpu.uuid})")
        if (gpu := told.get(rank.uuid))
        else rank
        for rank in ranks
    ]


def group_rates_of(ranks: Sequence[RankFacts]) -> dict[str, dict[tuple[int, ...], float]]:
    """By what was measured and by group. Each member has measured it, and the lowest rate counts."""
    kinds = dict.fromkeys(kind for rank in ranks for kind in rank.groups)
    return {kind: _lowest([rank.groups[kind] for rank in ranks if kind in rank.groups]) for kind in kinds}


def pair_rates_of(ranks: Sequence[RankFacts]) -> dict[str, dict[tuple[int, int], float]]:
    """As `group_rates_of`, by kind and by pair."""
    kinds = dict.fromkeys(kind for rank in ranks for kind in rank.pairs)
    return {kind: _lowest([pair for rank in ranks for pair in rank.pairs.get(kind, [])]) for kind in kinds}


def _lowest(measured: Sequence[tuple[_Key, float]]) -> dict[_Key, float]:
    rates: dict[_Key, float] = {}
    for key, rate in measured:
        rates[key] = min(rate, rates.get(key, rate))
    return rates
